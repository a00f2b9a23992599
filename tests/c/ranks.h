/* Ranks of a group as processes: fork() before any engine, and shared memory in which they meet. A
 * rank that is gone is missed after some seconds; nothing that it holds when it is killed can hold
 * others up, so there are no locks. */
#ifndef RANKS_H
#define RANKS_H

#include "check.h"

#include <signal.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

enum { MOST_RANKS = 4, ROOM = 1 << 20, MISSED = 2 };

/* What all ranks see. Counts are of the collectives made. */
struct meeting {
  uint32_t size;
  int is_dead;
  uint64_t brought[MOST_RANKS], taken[MOST_RANKS];
  unsigned char sent[MOST_RANKS][ROOM];
};

/* A rank's own. */
struct place {
  struct meeting *meeting;
  uint32_t rank;
  uint64_t calls, fails_at; /* fails_at: the number of the call that fails, from 1 on */
  int aborts, frees;
};

static inline struct meeting *new_meeting(uint32_t size) {
  struct meeting *meeting =
      mmap(NULL, sizeof *meeting, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
  CHECK(meeting != MAP_FAILED);
  meeting->size = size;
  return meeting;
}

/* Waits until all have made so many; 1 if one is missed. */
static inline int wait_for_all(struct meeting *meeting, const uint64_t *counts, uint64_t count) {
  const struct timespec moment = {0, 20000};
  struct timespec now;
  clock_gettime(CLOCK_MONOTONIC, &now);
  const time_t until = now.tv_sec + MISSED;
  for (uint32_t rank = 0; rank < meeting->size;) {
    if (__atomic_load_n(&meeting->is_dead, __ATOMIC_ACQUIRE)) return 1;
    if (__atomic_load_n(&counts[rank], __ATOMIC_ACQUIRE) >= count) {
      rank++;
      continue;
    }
    nanosleep(&moment, NULL);
    clock_gettime(CLOCK_MONOTONIC, &now);
    if (now.tv_sec > until) __atomic_store_n(&meeting->is_dead, 1, __ATOMIC_RELEASE);
  }
  return 0;
}

/* Brings `length` bytes; from then on those of all are there until `leave`. */
static inline int meet(struct place *place, const void *send, size_t length) {
  struct meeting *meeting = place->meeting;
  const uint64_t count = ++place->calls;
  if (count == place->fails_at) return 7;
  CHECK(length <= ROOM);
  if (wait_for_all(meeting, meeting->taken, count - 1) != 0) return 1;
  memcpy(meeting->sent[place->rank], send, length);
  __atomic_store_n(&meeting->brought[place->rank], count, __ATOMIC_RELEASE);
  return wait_for_all(meeting, meeting->brought, count);
}

static inline int leave(const struct place *place) {
  __atomic_store_n(&place->meeting->taken[place->rank], place->calls, __ATOMIC_RELEASE);
  return 0;
}

static inline int32_t rank_all_to_all(void *user_data, const void *send, void *receive,
                                      size_t bytes_per_rank) {
  struct place *place = user_data;
  struct meeting *meeting = place->meeting;
  unsigned char *to = receive;
  const int status = meet(place, send, bytes_per_rank * meeting->size);
  if (status != 0) return status;
  for (uint32_t rank = 0; rank < meeting->size; rank++)
    memcpy(to + rank * bytes_per_rank, meeting->sent[rank] + place->rank * bytes_per_rank,
           bytes_per_rank);
  return leave(place);
}

static inline int32_t rank_all_gather(void *user_data, const void *send, void *receive,
                                      size_t bytes_per_rank) {
  struct place *place = user_data;
  struct meeting *meeting = place->meeting;
  unsigned char *to = receive;
  const int status = meet(place, send, bytes_per_rank);
  if (status != 0) return status;
  for (uint32_t rank = 0; rank < meeting->size; rank++)
    memcpy(to + rank * bytes_per_rank, meeting->sent[rank], bytes_per_rank);
  return leave(place);
}

static inline void rank_abort(void *user_data) {
  struct place *place = user_data;
  place->aborts++;
  __atomic_store_n(&place->meeting->is_dead, 1, __ATOMIC_RELEASE);
}

static inline void rank_free(void *user_data) { ((struct place *)user_data)->frees++; }

static inline mxt_group group_of(struct place *place) {
  mxt_group group;
  OK(mxt_group_init(&group, sizeof group));
  group.rank = place->rank;
  group.size = place->meeting->size;
  group.all_to_all = rank_all_to_all;
  group.all_gather = rank_all_gather;
  group.abort = rank_abort;
  group.user_data = place;
  group.user_data_free = rank_free;
  return group;
}

static inline mxt_engine *engine_of(struct place *place) {
  mxt_engine_options options;
  mxt_engine *engine = NULL;
  const mxt_group group = group_of(place);
  OK(mxt_engine_options_init(&options, sizeof options));
  options.threads = 1;
  options.group = &group;
  OK(mxt_engine_new(&options, &engine));
  return engine;
}

/* Runs `rank` in a process of its own for each; gives their numbers. */
static inline void start_ranks(struct meeting *meeting, int (*rank)(struct place *), pid_t *pids) {
  fflush(NULL);
  for (uint32_t number = 0; number < meeting->size; number++) {
    pids[number] = fork();
    CHECK(pids[number] >= 0);
    if (pids[number] == 0) {
      struct place place = {.meeting = meeting, .rank = number};
      _exit(rank(&place));
    }
  }
}

/* The exit codes of all, or minus the signal that ended one. */
static inline void end_ranks(const struct meeting *meeting, const pid_t *pids, int *codes) {
  for (uint32_t number = 0; number < meeting->size; number++) {
    int status = 0;
    CHECK(waitpid(pids[number], &status, 0) == pids[number]);
    codes[number] = WIFEXITED(status) ? WEXITSTATUS(status) : -WTERMSIG(status);
  }
}

#endif
