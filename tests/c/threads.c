/* Threads: two trainers at once, a stop from another thread, two threads on one trainer. */
#define _POSIX_C_SOURCE 200809L
#include "check.h"

#include <pthread.h>

struct job {
  const mxt_engine *engine;
  const mxt_dataset *dataset;
  float losses[20];
};

static void *train(void *argument) {
  struct job *job = argument;
  mxt_model *model = new_model(job->engine);
  mxt_trainer *trainer = new_trainer(model);
  for (int i = 0; i < 20; i++) job->losses[i] = step(trainer, job->dataset).loss;
  mxt_trainer_free(trainer);
  mxt_model_free(model);
  return NULL;
}

struct shared {
  mxt_trainer *trainer;
  const mxt_dataset *dataset;
  uint64_t done, busy;
};

/* Steps of two threads on one trainer: each is done or refused. */
static void *compete(void *argument) {
  struct shared *it = argument;
  for (int i = 0; i < 200; i++) {
    const mxt_status status = mxt_trainer_step(it->trainer, it->dataset, NULL);
    if (status == MXT_OK) it->done++;
    else {
      RETURNS(MXT_ERROR_BUSY, status);
      CHECK(strstr(mxt_last_error(), "another call") != NULL);
      it->busy++;
    }
  }
  return NULL;
}

static void *stop(void *argument) {
  struct shared *it = argument;
  while (mxt_trainer_steps_done(it->trainer) < 3) continue;
  mxt_trainer_request_stop(it->trainer);
  return NULL;
}

static void *free_trainer(void *argument) {
  mxt_trainer_free(argument);
  return NULL;
}

/* Each thread has its own last error. */
static void *fail_alone(void *argument) {
  (void)argument;
  CHECK(mxt_last_error()[0] == 0);
  RETURNS(MXT_ERROR_NULL, mxt_trainer_set_lr(NULL, 1));
  CHECK(strstr(mxt_last_error(), "mxt_trainer_set_lr") != NULL);
  return NULL;
}

int main(void) {
  mxt_engine *engine = new_engine();
  mxt_dataset *dataset = new_dataset();
  pthread_t a, b;

  /* One engine, one dataset, two trainers: the same losses as each alone. */
  static struct job jobs[3];
  for (int i = 0; i < 3; i++) jobs[i].engine = engine, jobs[i].dataset = dataset;
  CHECK(pthread_create(&a, NULL, train, &jobs[0]) == 0);
  CHECK(pthread_create(&b, NULL, train, &jobs[1]) == 0);
  CHECK(pthread_join(a, NULL) == 0 && pthread_join(b, NULL) == 0);
  train(&jobs[2]);
  CHECK(memcmp(jobs[0].losses, jobs[1].losses, sizeof jobs[0].losses) == 0);
  CHECK(memcmp(jobs[0].losses, jobs[2].losses, sizeof jobs[0].losses) == 0);

  mxt_model *model = new_model(engine);
  mxt_trainer *trainer = new_trainer(model);
  struct shared one = {trainer, dataset, 0, 0}, two = one;
  CHECK(pthread_create(&a, NULL, compete, &one) == 0);
  CHECK(pthread_create(&b, NULL, compete, &two) == 0);
  CHECK(pthread_join(a, NULL) == 0 && pthread_join(b, NULL) == 0);
  CHECK(one.done + two.done == mxt_trainer_steps_done(trainer));
  CHECK(one.done + one.busy == 200 && two.done + two.busy == 200);
  mxt_trainer_free(trainer);

  trainer = new_trainer(model);
  one.trainer = trainer;
  mxt_run_options run;
  mxt_run_result result;
  OK(mxt_run_options_init(&run, sizeof run));
  run.steps = 1000000000;
  result.struct_size = sizeof result;
  CHECK(pthread_create(&a, NULL, stop, &one) == 0);
  OK(mxt_trainer_run(trainer, dataset, &run, &result));
  CHECK(pthread_join(a, NULL) == 0);
  CHECK(result.end == MXT_RUN_END_REQUEST && result.steps >= 3);

  RETURNS(MXT_ERROR_NULL, mxt_trainer_step(NULL, dataset, NULL));
  CHECK(pthread_create(&a, NULL, fail_alone, NULL) == 0 && pthread_join(a, NULL) == 0);
  CHECK(strstr(mxt_last_error(), "mxt_trainer_step") != NULL);

  CHECK(pthread_create(&a, NULL, free_trainer, trainer) == 0 && pthread_join(a, NULL) == 0);
  mxt_model_free(model);
  mxt_dataset_free(dataset);
  mxt_engine_free(engine);
  return 0;
}
