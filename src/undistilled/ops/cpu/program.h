// A pass that was recorded: the steps that ran, to be run again in one go; see program.cpp.
#pragma once
#include "pool.h"

// Keeps a step that this thread just ran, if it is recording.
void record(const Step& step);
