/* Trains a small GPT by several threads of one process, each a rank with an engine of its own: what
 * they send each other lies in the memory that they share.
 *
 *   cargo build --release
 *   cc -std=c99 examples/c/train_threads.c -Iinclude -Ltarget/release -lmxfp4train -lpthread \
 *      -o train_threads
 *   ln -s libmxfp4train.so target/release/libmxfp4train.so.0
 *   LD_LIBRARY_PATH=target/release ./train_threads 4
 *
 * With four lanes 1, 2 and 4 threads print the same numbers. On GPUs give each rank its own by
 * options.device; gradients then go from GPU to GPU, and through here little more than votes. */
#define _POSIX_C_SOURCE 200809L
#include "mxfp4train.h"

#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { MOST_RANKS = 4 };

/* Where ranks meet. A rank waits for others under the lock, so that one that gives up can wake
 * them; pthread_barrier_wait could not be left. */
typedef struct meeting {
  pthread_mutex_t lock;
  pthread_cond_t changed;
  int size, arrived, has_ended;
  unsigned long round;
  const void *sent[MOST_RANKS];
} meeting;

typedef struct rank {
  meeting *meeting;
  int number;
  pthread_t thread;
  float loss;
} rank;

/* Waits until all ranks are here; not 0 when one has given up. */
static int meet(meeting *m) {
  pthread_mutex_lock(&m->lock);
  const unsigned long round = m->round;
  if (++m->arrived == m->size) {
    m->arrived = 0;
    m->round++;
    pthread_cond_broadcast(&m->changed);
  }
  while (m->round == round && !m->has_ended) pthread_cond_wait(&m->changed, &m->lock);
  const int has_ended = m->round == round;
  pthread_mutex_unlock(&m->lock);
  return has_ended;
}

/* Copies from what each rank sends: block `block` of it. What is sent stays until all have it. */
static int32_t exchange(const rank *self, const void *send, void *receive, size_t bytes,
                        size_t block) {
  meeting *m = self->meeting;
  m->sent[self->number] = send;
  if (meet(m)) return 1;
  for (int from = 0; from < m->size; from++)
    memcpy((char *)receive + (size_t)from * bytes, (const char *)m->sent[from] + block * bytes,
           bytes);
  return meet(m);
}

static int32_t all_to_all(void *user_data, const void *send, void *receive, size_t bytes_per_rank) {
  const rank *self = user_data;
  return exchange(self, send, receive, bytes_per_rank, (size_t)self->number);
}

static int32_t all_gather(void *user_data, const void *send, void *receive, size_t bytes_per_rank) {
  return exchange(user_data, send, receive, bytes_per_rank, 0);
}

/* This rank gives up: whoever waits for it returns. */
static void give_up(void *user_data) {
  meeting *m = ((const rank *)user_data)->meeting;
  pthread_mutex_lock(&m->lock);
  m->has_ended = 1;
  pthread_cond_broadcast(&m->changed);
  pthread_mutex_unlock(&m->lock);
}

/* Ends the process with the library's message when a call failed. */
static void check(mxt_status status) {
  if (status == MXT_OK) return;
  fprintf(stderr, "%s: %s\n", mxt_status_string(status), mxt_last_error());
  exit(1);
}

static const char rhyme[] =
    "Humpty Dumpty sat on a wall, Humpty Dumpty had a great fall; "
    "all the king's horses and all the king's men could not put Humpty together again. ";

/* What every rank does. The calls that all of them make are listed at mxt_group in the header. */
static void *train(void *of) {
  rank *self = of;
  mxt_group group;
  check(mxt_group_init(&group, sizeof group));
  group.rank = (uint32_t)self->number;
  group.size = (uint32_t)self->meeting->size;
  group.all_to_all = all_to_all;
  group.all_gather = all_gather;
  group.abort = give_up;
  group.user_data = self;
  mxt_engine_options options;
  check(mxt_engine_options_init(&options, sizeof options));
  options.group = &group;
  options.threads = 1;
  mxt_engine *engine = NULL;
  check(mxt_engine_new(&options, &engine));

  uint32_t tokens[8192];
  for (size_t i = 0; i < 8192; i++) tokens[i] = (unsigned char)rhyme[i % (sizeof rhyme - 1)];
  mxt_dataset *dataset = NULL;
  check(mxt_dataset_from_tokens(tokens, 8192, &dataset));

  mxt_model_config config;
  check(mxt_model_config_init(&config, sizeof config));
  config.vocab_size = 128;
  config.context_length = 64;
  config.layers = 2;
  config.heads = 4;
  config.channels = 64;
  mxt_model *model = NULL;
  check(mxt_model_new(engine, &config, &model));

  mxt_trainer_options how;
  check(mxt_trainer_options_init(&how, sizeof how));
  how.batch_size = 2;
  how.lanes = 4; /* the step is the sum of four, on 1, 2 or 4 ranks */
  how.lr = 3e-3f;
  mxt_trainer *trainer = NULL;
  check(mxt_trainer_new(model, &how, &trainer));
  for (int i = 0; i < 20; i++) {
    mxt_step_stats stats;
    stats.struct_size = sizeof stats;
    check(mxt_trainer_step(trainer, dataset, &stats));
    self->loss = stats.loss;
    if (self->number == 0)
      printf("step %2d  loss %.6f  norm %.6f\n", i + 1, (double)stats.loss,
             (double)stats.grad_norm);
  }

  mxt_trainer_free(trainer);
  mxt_model_free(model);
  mxt_dataset_free(dataset);
  mxt_engine_free(engine);
  return NULL;
}

int main(int argc, char **argv) {
  static meeting shared = {PTHREAD_MUTEX_INITIALIZER, PTHREAD_COND_INITIALIZER, 2, 0, 0, 0, {0}};
  if (argc > 1) shared.size = atoi(argv[1]);
  if (shared.size < 1 || shared.size > MOST_RANKS) {
    fprintf(stderr, "expected a number of threads from 1 to %d\n", MOST_RANKS);
    return 2;
  }
  rank ranks[MOST_RANKS];
  for (int i = 0; i < shared.size; i++) {
    ranks[i] = (rank){&shared, i, 0, 0.0f};
    if (pthread_create(&ranks[i].thread, NULL, train, &ranks[i]) != 0) {
      fprintf(stderr, "a thread cannot be started\n");
      return 1;
    }
  }
  for (int i = 0; i < shared.size; i++) pthread_join(ranks[i].thread, NULL);
  for (int i = 1; i < shared.size; i++)
    if (ranks[i].loss != ranks[0].loss) return 1;
  return 0;
}
