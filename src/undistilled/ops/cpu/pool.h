// Our own threads: a team that runs kernels, each thread of it going through the whole kernel (SPMD).
//
// A kernel is a Step: run(team) is entered by every thread. share(n, body) divides bodies among them, barrier() waits
// until all are there. What a body computes must not depend on who runs it, so that results do not depend on the size
// of the team. One step alone is a run of the pool; a program (program.h) is many in one run.
#pragma once
#include <atomic>
#include <cstdint>
#include "scratch.h"

struct Gate {                        // a number that others wait for, first by looking, then asleep
  std::atomic<uint32_t> value{0};
  std::atomic<int> sleepers{0};
  void open(uint32_t next);
  void wait(uint32_t old, long look);   // until the value is another than `old`; look: microseconds
};

constexpr int SLOTS = 16;            // share()s between two barriers

struct alignas(64) Taken { std::atomic<long> count{0}; };

struct Crew {                        // what the threads of a team have in common
  int size;
  Taken* taken;                      // [SLOTS][size]; null for a crew of one
  std::atomic<int> arrived{0};
  Gate passed;
};

struct Team {                        // as one of its threads sees it
  Crew& crew;
  const int rank, size;
  void* scratch;                     // of the step: what its scratch() asked for, for all threads
  int used = 0;                      // slots since the last barrier

  // body(i) for i in [0, n), each by one thread: first its own part in order, then what is left of the others'.
  template <class F> void share(long n, F body) {
    if (size == 1) {
      for (long i = 0; i < n; i++) body(i);
      return;
    }
    Taken* taken = crew.taken + used++ * size;
    for (int turn = 0, owner = rank; turn < size; turn++, owner = owner + 1 < size ? owner + 1 : 0) {
      long from = n * owner / size, count = n * (owner + 1) / size - from;
      while (taken[owner].count.load(std::memory_order_relaxed) < count) {
        long i = taken[owner].count.fetch_add(1, std::memory_order_relaxed);
        if (i < count) body(from + i);
      }
    }
  }
  void barrier();
};

struct Range {                       // memory that a step reads or writes
  const void* at;
  long bytes;
  bool written;
};

struct Step {
  const char* name = "";
  long weights = 0;                  // bytes of weights that it reads, where that is known before it runs
  bool small = false;                // less work than a team costs: the first thread runs it, alone
  bool shared = false;               // whether it may take scratch
  int count = 0;
  Range ranges[8];

  virtual void run(Team& team) const = 0;
  virtual long scratch() const { return 0; }   // bytes, for what its inputs say now
  virtual Step* copy() const = 0;
  virtual ~Step() {}

  void reads(const void* at, long bytes) { ranges[count++] = {at, bytes, false}; }
  void writes(const void* at, long bytes) { ranges[count++] = {at, bytes, true}; }
};

template <class S> struct Kernel : Step {
  Step* copy() const override { return new S(*(const S*)this); }
};

// Calls enter(context, team) on every thread of the team, with that much scratch; on the caller's alone where the pool
// is somebody else's at the moment.
void run_pool(void (*enter)(const void* context, Team& team), const void* context, long scratch);

// Runs a step now, and keeps it where a program is being recorded by this thread.
void submit(const Step& step);
