/* Data that stay with the host: tokens that are not copied, and windows that it fills, with
   weights; given back once, whoever frees what when. */
#include "check.h"

#include <math.h>

typedef struct {
  int calls, freed, fails_at, stops_at;
  float weight;
  mxt_trainer *trainer, *stopped;
} host;

static void give_back(void *user_data) { ((host *)user_data)->freed++; }

static int32_t fill(void *user_data, uint64_t number, uint32_t *tokens, float *weights,
                    size_t length) {
  host *h = user_data;
  CHECK(length == CONTEXT && number < 10 && h->freed == 0);
  if (h->trainer != NULL) RETURNS(MXT_ERROR_BUSY, mxt_trainer_update(h->trainer, NULL));
  if (++h->calls == h->fails_at) return 3;
  if (h->calls == h->stops_at) mxt_trainer_request_stop(h->stopped);
  for (size_t i = 0; i <= length; i++) tokens[i] = (uint32_t)((i * i + number * i + number) % 29);
  for (size_t i = 0; i < length; i++) {
    CHECK(weights[i] == 1.0f);
    if (i < 8) weights[i] = h->weight;
  }
  return 0;
}

int main(void) {
  mxt_engine *engine = new_engine();
  mxt_model *models[2] = {new_model(engine), new_model(engine)};
  mxt_trainer *copied = new_trainer(models[0]), *lent = new_trainer(models[1]);

  /* The host's memory has the steps of a copy, in either width. */
  static uint16_t narrow[DATA];
  static uint32_t wide[DATA];
  for (uint32_t i = 0; i < DATA; i++) narrow[i] = (uint16_t)(wide[i] = (i * i + i / 7) % 29);
  host memory = {0};
  mxt_dataset *datasets[3] = {new_dataset(), NULL, NULL};
  OK(mxt_dataset_from_memory(narrow, DATA, MXT_TOKEN_TYPE_U16, &memory, give_back, &datasets[1]));
  OK(mxt_dataset_from_memory(wide, DATA, MXT_TOKEN_TYPE_U32, &memory, give_back, &datasets[2]));
  CHECK(mxt_dataset_token_count(datasets[1]) == DATA);
  for (int i = 0; i < 6; i++)
    CHECK(step(lent, datasets[1 + i % 2]).loss == step(copied, datasets[0]).loss);
  uint32_t some[3], largest = 0;
  OK(mxt_dataset_read(datasets[1], 100, 3, some));
  CHECK(some[0] == wide[100] && some[2] == wide[102]);
  OK(mxt_dataset_max_token(datasets[1], &largest));
  CHECK(largest < 29);
  CHECK(memory.freed == 0);
  mxt_dataset_free(datasets[1]);
  mxt_dataset_free(datasets[2]);
  CHECK(memory.freed == 2);
  mxt_dataset *none = NULL;
  FAILS(MXT_ERROR_INVALID_ARGUMENT, "MXT_TOKEN_TYPE_U16",
        mxt_dataset_from_memory(wide, DATA, MXT_TOKEN_TYPE_I64, &memory, give_back, &none));
  FAILS(MXT_ERROR_INVALID_ARGUMENT, "at least one token",
        mxt_dataset_from_memory(wide, 0, MXT_TOKEN_TYPE_U32, &memory, give_back, &none));
  FAILS(MXT_ERROR_INVALID_ARGUMENT, "2 divides",
        mxt_dataset_from_memory((char *)narrow + 1, 5, MXT_TOKEN_TYPE_U16, NULL, NULL, &none));
  wide[17] = 40;
  OK(mxt_dataset_from_memory(wide, DATA, MXT_TOKEN_TYPE_U32, NULL, NULL, &none));
  FAILS(MXT_ERROR_TOKEN_RANGE, "40", mxt_trainer_step(lent, none, NULL));
  mxt_dataset_free(none);
  none = NULL;
  CHECK(memory.freed == 2);

  /* Windows: a step, an evaluation, a run. */
  host windows = {0};
  mxt_dataset *filled = NULL;
  FAILS(MXT_ERROR_INVALID_ARGUMENT, "at least 1",
        mxt_dataset_from_windows(0, fill, &windows, give_back, &none));
  OK(mxt_dataset_from_windows(10, fill, &windows, give_back, &filled));
  CHECK(windows.freed == 0 && mxt_dataset_token_count(filled) == 0);
  windows.trainer = lent;
  const float loss = step(lent, filled).loss;
  CHECK(loss > 0.0f && windows.calls == BATCH);
  windows.trainer = NULL;
  mxt_eval_stats eval;
  eval.struct_size = sizeof eval;
  OK(mxt_trainer_eval(lent, filled, 0, &eval));
  CHECK(eval.tokens == 10 * (CONTEXT - 8) && windows.calls == BATCH + 10);
  windows.weight = 1.0f;
  OK(mxt_trainer_eval(lent, filled, 0, &eval));
  CHECK(eval.tokens == 10 * CONTEXT);
  mxt_run_options run;
  OK(mxt_run_options_init(&run, sizeof run));
  run.steps = 20;
  run.eval_dataset = filled;
  OK(mxt_trainer_run(lent, filled, &run, NULL));

  /* What goes wrong in it. */
  const uint64_t before = mxt_trainer_steps_done(lent);
  windows.calls = 0;
  windows.fails_at = 2;
  FAILS(MXT_ERROR_IO, "the callback returned 3", mxt_trainer_step(lent, filled, NULL));
  windows.fails_at = 0;
  windows.weight = NAN;
  FAILS(MXT_ERROR_NOT_FINITE, "weight 0 of window", mxt_trainer_step(lent, filled, NULL));
  windows.weight = 0.0f;
  CHECK(mxt_trainer_steps_done(lent) == before);
  FAILS(MXT_ERROR_UNSUPPORTED, "in a row", mxt_dataset_max_token(filled, &largest));
  FAILS(MXT_ERROR_UNSUPPORTED, "in a row", mxt_dataset_read(filled, 0, 1, some));
  CHECK(step(lent, filled).step == before + 1 && windows.freed == 0);
  mxt_dataset_free(filled);
  CHECK(windows.freed == 1);

  /* A stop in the middle of a step of 32 batches: nothing of it is done, and the next is the same.
   */
  mxt_trainer_options options = small_options();
  options.accumulation = 32;
  host stopping = {0};
  stopping.weight = 0.5f;
  mxt_model *other_models[2] = {new_model(engine), new_model(engine)};
  mxt_trainer *straight = NULL, *stopped = NULL;
  OK(mxt_trainer_new(other_models[0], &options, &straight));
  OK(mxt_trainer_new(other_models[1], &options, &stopped));
  OK(mxt_dataset_from_windows(10, fill, &stopping, NULL, &filled));
  stopping.stopped = stopped;
  stopping.stops_at = 5 * BATCH;
  mxt_step_stats stats;
  stats.struct_size = sizeof stats;
  FAILS(MXT_STOPPED, "as asked", mxt_trainer_step_unless_stopped(stopped, filled, &stats));
  CHECK(stopping.calls == 5 * BATCH && mxt_trainer_steps_done(stopped) == 0);
  FAILS(MXT_STOPPED, "as asked", mxt_trainer_step_unless_stopped(stopped, filled, &stats));
  FAILS(MXT_STOPPED, "as asked", mxt_trainer_eval(stopped, filled, 0, &eval));
  CHECK(stopping.calls == 5 * BATCH);
  mxt_trainer_clear_stop(stopped);
  for (int i = 0; i < 3; i++) {
    const float expected = step(straight, filled).loss;
    OK(mxt_trainer_step_unless_stopped(stopped, filled, &stats));
    CHECK(stats.loss == expected);
  }
  mxt_dataset_free(filled);
  mxt_trainer_free(straight);
  mxt_trainer_free(stopped);
  mxt_model_free(other_models[0]);
  mxt_model_free(other_models[1]);

  mxt_dataset_free(datasets[0]);
  mxt_trainer_free(copied);
  mxt_trainer_free(lent);
  mxt_model_free(models[0]);
  mxt_model_free(models[1]);
  mxt_engine_free(engine);
  CHECK(windows.freed == 1 && memory.freed == 2);
  return 0;
}
