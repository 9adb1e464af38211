#include "pool.h"
#include <pthread.h>
#include <signal.h>
#include <time.h>
#if defined(__linux__)
#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif
#include "program.h"

namespace {

constexpr long LOOK = 30;            // microseconds at a barrier before a thread sleeps
constexpr long LOOK_FOR_WORK = 60;   // and between runs

static inline void rest() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

long microseconds() {
  timespec now;
  clock_gettime(CLOCK_MONOTONIC, &now);
  return now.tv_sec * 1000000 + now.tv_nsec / 1000;
}

void sleep_while(std::atomic<uint32_t>& value, uint32_t old) {
#if defined(__linux__)
  syscall(SYS_futex, &value, FUTEX_WAIT_PRIVATE, old, nullptr, nullptr, 0);
#else
  timespec some = {0, 50000};
  if (value.load() == old) nanosleep(&some, nullptr);
#endif
}

void wake(std::atomic<uint32_t>& value) {
#if defined(__linux__)
  syscall(SYS_futex, &value, FUTEX_WAKE_PRIVATE, INT32_MAX, nullptr, nullptr, 0);
#else
  (void)value;
#endif
}

std::atomic<int> wanted{1};          // threads

struct Pool {
  pthread_mutex_t mine = PTHREAD_MUTEX_INITIALIZER;   // held through a run
  Crew crew = {1, nullptr, {}, {}};
  pthread_t* threads = nullptr;
  Gate work;                         // counts runs
  void (*enter)(const void*, Team&) = nullptr;   // null: the threads end
  const void* context = nullptr;
  Scratch scratch;

  struct Member { Pool* pool; int rank; uint32_t seen; };

  static void* live(void* argument) {
    Member me = *(Member*)argument;
    delete (Member*)argument;
    for (;; me.seen++) {
      me.pool->work.wait(me.seen, LOOK_FOR_WORK);
      if (!me.pool->enter) return nullptr;
      Team team = {me.pool->crew, me.rank, me.pool->crew.size, me.pool->scratch.held};
      me.pool->enter(me.pool->context, team);
      team.barrier();
    }
  }
  // Ends the threads there are and starts size - 1 others, fewer where the system gives fewer.
  void resize(int size) {
    if (size == crew.size) return;
    enter = nullptr;
    work.open(work.value.load() + 1);
    for (int i = 1; i < crew.size; i++) pthread_join(threads[i], nullptr);
    delete[] threads;
    delete[] crew.taken;
    threads = new pthread_t[size];
    sigset_t all, before;              // signals are the program's
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    int started = 1;
    while (started < size) {
      Member* member = new Member{this, started, work.value.load()};
      if (pthread_create(threads + started, nullptr, live, member)) {
        delete member;
        break;
      }
      started++;
    }
    pthread_sigmask(SIG_SETMASK, &before, nullptr);
    crew.taken = new Taken[SLOTS * started];
    crew.size = started;
    if (started < size) wanted = started;
  }
  void run(void (*f)(const void*, Team&), const void* with, long bytes) {
    resize(wanted.load(std::memory_order_relaxed));
    enter = f;
    context = with;
    void* memory = scratch.of(bytes);
    if (crew.size > 1) work.open(work.value.load(std::memory_order_relaxed) + 1);
    Team team = {crew, 0, crew.size, memory};
    f(with, team);
    team.barrier();
    scratch.keep(KEPT);
  }
  static constexpr long KEPT = 8 << 20;   // bytes of scratch that stay from run to run
};

Pool* pool;
pthread_once_t once = PTHREAD_ONCE_INIT;

void fresh() { pool = new Pool; }    // also in a forked child, where the parent's threads are not

void first() {
  fresh();
  pthread_atfork(nullptr, nullptr, fresh);
}

Pool& the_pool() {
  pthread_once(&once, first);
  return *pool;
}

void enter_step(const void* step, Team& team) { ((const Step*)step)->run(team); }

}  // namespace

void Gate::open(uint32_t next) {
  value.store(next);
  if (sleepers.load()) wake(value);
}

void Gate::wait(uint32_t old, long look) {
  for (int i = 0; i < 64; i++) {
    if (value.load(std::memory_order_acquire) != old) return;
    rest();
  }
  for (long began = microseconds(); microseconds() - began < look;)
    for (int i = 0; i < 16; i++) {
      if (value.load(std::memory_order_acquire) != old) return;
      rest();
    }
  sleepers.fetch_add(1);
  while (value.load() == old) sleep_while(value, old);
  sleepers.fetch_sub(1);
}

void Team::barrier() {
  if (size == 1) return;
  uint32_t seen = crew.passed.value.load(std::memory_order_relaxed);
  if (crew.arrived.fetch_add(1, std::memory_order_acq_rel) == size - 1) {
    for (int i = 0; i < used * size; i++) crew.taken[i].count.store(0, std::memory_order_relaxed);
    crew.arrived.store(0, std::memory_order_relaxed);
    crew.passed.open(seen + 1);
  } else {
    crew.passed.wait(seen, LOOK);
  }
  used = 0;
}

void run_pool(void (*enter)(const void*, Team&), const void* context, long bytes) {
  Pool& p = the_pool();
  if (pthread_mutex_trylock(&p.mine) == 0) {
    p.run(enter, context, bytes);
    pthread_mutex_unlock(&p.mine);
    return;
  }
  Scratch own;
  Crew crew = {1, nullptr, {}, {}};
  Team team = {crew, 0, 1, own.of(bytes)};
  enter(context, team);
}

void submit(const Step& step) {
  if (step.small) {
    Crew crew = {1, nullptr, {}, {}};
    Team team = {crew, 0, 1, nullptr};
    step.run(team);
  } else {
    run_pool(enter_step, &step, step.scratch());
  }
  record(step);
}

extern "C" void native_threads(int size) { wanted = size < 1 ? 1 : size; }
