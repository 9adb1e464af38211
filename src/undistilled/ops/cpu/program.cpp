// A recorded pass. Steps run in their order by one team; a barrier stands before a step only where it reads what
// others wrote since the last one, writes what they read or wrote, or shares their scratch. Steps for one thread alone
// follow each other without.
#include "program.h"
#include <ctime>
#include <vector>

namespace {

constexpr int SHARES = 3;            // of a step before its first barrier of its own, at most

struct Placed {
  Step* step;
  bool apart;                        // a barrier stands before it
};

struct Program {
  std::vector<Placed> placed;
  size_t open = 0;                   // the first step behind the last barrier
  double* seconds = nullptr;         // of each step, where they are asked for

  ~Program() {
    for (Placed& p : placed) delete p.step;
  }
  void add(Step* step) {
    bool apart = false;
    int shares = 0;
    for (size_t i = open; i < placed.size(); i++) {
      const Step& before = *placed[i].step;
      shares += before.small ? 0 : SHARES;
      if (!(before.small && step->small)) apart |= meet(before, *step);
    }
    if (shares + SHARES > SLOTS) apart = true;
    if (apart) open = placed.size();
    placed.push_back({step, apart});
  }
  static bool meet(const Step& a, const Step& b) {
    if (a.shared && b.shared) return true;
    for (int i = 0; i < a.count; i++)
      for (int j = 0; j < b.count; j++) {
        const Range &r = a.ranges[i], &s = b.ranges[j];
        if ((r.written || s.written) && (const char*)r.at < (const char*)s.at + s.bytes &&
            (const char*)s.at < (const char*)r.at + r.bytes)
          return true;
      }
    return false;
  }
};

thread_local Program* recording;

double now() {
  timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return t.tv_sec + t.tv_nsec * 1e-9;
}

void enter(const void* context, Team& team) {
  const Program& program = *(const Program*)context;
  double began = program.seconds ? now() : 0;
  for (size_t i = 0; i < program.placed.size(); i++) {
    const Step& step = *program.placed[i].step;
    if (program.placed[i].apart || program.seconds) team.barrier();
    if (program.seconds && team.rank == 0 && i) {
      double here = now();
      program.seconds[i - 1] += here - began;
      began = here;
    }
    if (!step.small) {
      step.run(team);
    } else if (team.rank == 0) {
      Crew crew = {1, nullptr, {}, {}};
      Team alone = {crew, 0, 1, nullptr};
      step.run(alone);
    }
  }
  if (!program.seconds) return;
  team.barrier();
  if (team.rank == 0 && !program.placed.empty()) program.seconds[program.placed.size() - 1] += now() - began;
}

}  // namespace

void record(const Step& step) {
  if (recording) recording->add(step.copy());
}

extern "C" {

Program* native_program(void) { return new Program; }
void native_program_free(Program* program) { delete program; }

// Steps that this thread runs from now on go into `program`; null: into none.
void native_program_record(Program* program) { recording = program; }

// Runs the steps; where `seconds` is given, one by one, and adds the time of each.
void native_program_run(Program* program, double* seconds) {
  long bytes = 0;
  for (const Placed& p : program->placed) {
    long own = p.step->shared ? p.step->scratch() : 0;
    bytes = own > bytes ? own : bytes;
  }
  program->seconds = seconds;
  run_pool(enter, program, bytes);
}

long native_program_steps(const Program* program) { return program->placed.size(); }
const char* native_program_name(const Program* program, long i) { return program->placed[i].step->name; }
long native_program_weights(const Program* program, long i) { return program->placed[i].step->weights; }
int native_program_apart(const Program* program, long i) { return program->placed[i].apart; }

}  // extern "C"
