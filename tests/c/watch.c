/* What a trainer watches: what updates do to tensors. */
#include "check.h"

#include <math.h>
#include <stddef.h>

#define WTE "transformer.wte.weight"
#define QKV "transformer.h.0.attn.c_attn.weight"

static const char *name_of(const mxt_model *model, size_t number) {
  mxt_tensor_info info;
  info.struct_size = sizeof info;
  OK(mxt_model_tensor_info(model, number, &info));
  return info.name;
}

static mxt_tensor_update update_of(mxt_trainer *trainer, const char *tensor) {
  mxt_tensor_update update;
  update.struct_size = sizeof update;
  OK(mxt_trainer_tensor_update(trainer, tensor, &update));
  CHECK(update.struct_size == sizeof update);
  return update;
}

static int is_unwatched(const mxt_step_stats *stats) {
  return isnan(stats->update_rms_max) && stats->update_rms_tensor == UINT32_MAX;
}

/* That nothing was watched yet, and what to do about it. */
static void no_update_yet(mxt_trainer *trainer) {
  mxt_tensor_update update;
  update.struct_size = sizeof update;
  update.step = 77;
  FAILS(MXT_ERROR_INVALID_ARGUMENT, "call mxt_trainer_watch_updates",
        mxt_trainer_tensor_update(trainer, WTE, &update));
  CHECK(update.step == 77);
}

/* The tensors' updates are those of this step, and make up what its stats say. */
static void check_updates(mxt_trainer *trainer, mxt_model *model, const mxt_step_stats *stats) {
  double squares = 0;
  const size_t count = mxt_model_tensor_count(model);
  CHECK(stats->update_rms_tensor < count && stats->update_rms_max > 0);
  for (size_t i = 0; i < count; i++) {
    const mxt_tensor_update update = update_of(trainer, name_of(model, i));
    CHECK(update.step == stats->step && update.grad_norm >= 0);
    CHECK(!(update.rms > stats->update_rms_max));
    if (i < stats->update_rms_tensor) CHECK(!(update.rms >= stats->update_rms_max));
    if (i == stats->update_rms_tensor) CHECK(update.rms == stats->update_rms_max);
    squares += (double)update.grad_norm * update.grad_norm;
  }
  CHECK(fabs(sqrt(squares) / stats->grad_norm - 1) < 1e-5);
}

struct seen {
  mxt_trainer *trainer;
  mxt_model *model;
  int watched;
};

/* A run's steps have it, too, and its callback may ask for more. */
static int32_t see(void *user_data, const mxt_step_stats *stats, const mxt_eval_stats *eval) {
  struct seen *seen = user_data;
  CHECK(eval == NULL);
  if (is_unwatched(stats)) return 0;
  check_updates(seen->trainer, seen->model, stats);
  seen->watched++;
  return 0;
}

static void updates(const mxt_engine *engine, const mxt_dataset *dataset) {
  mxt_model *model = new_model(engine), *other_model = new_model(engine);
  mxt_trainer *trainer = new_trainer(model), *plain = new_trainer(other_model);
  no_update_yet(trainer);
  mxt_step_stats stats = step(trainer, dataset);
  CHECK(is_unwatched(&stats) && stats.loss == step(plain, dataset).loss);
  no_update_yet(trainer);

  OK(mxt_trainer_watch_updates(trainer, 2));
  no_update_yet(trainer);
  for (uint64_t number = 2; number <= 5; number++) {
    stats = step(trainer, dataset);
    CHECK(stats.step == number && stats.loss == step(plain, dataset).loss);
    if (number % 2 == 0) check_updates(trainer, model, &stats);
    else CHECK(is_unwatched(&stats) && update_of(trainer, WTE).step == number - 1);
  }
  mxt_tensor_update update;
  update.struct_size = sizeof update;
  FAILS(MXT_ERROR_NO_SUCH_TENSOR, "no.such",
        mxt_trainer_tensor_update(trainer, "no.such", &update));
  FAILS(MXT_ERROR_UTF8, "tensor", mxt_trainer_tensor_update(trainer, "\xff", &update));
  update.struct_size = offsetof(mxt_tensor_update, rms);
  FAILS(MXT_ERROR_STRUCT_SIZE, "update", mxt_trainer_tensor_update(trainer, WTE, &update));

  /* Programs of older headers. */
  mxt_step_stats older;
  const size_t sizes[] = {offsetof(mxt_step_stats, raised_blocks),
                          offsetof(mxt_step_stats, update_rms_max)};
  for (int i = 0; i < 2; i++) {
    memset(&older, 0x5a, sizeof older);
    older.struct_size = sizes[i];
    OK(mxt_trainer_step(trainer, dataset, &older));
    CHECK(older.struct_size == sizes[i] && older.step == 6 + (uint64_t)i);
    CHECK((older.raised_blocks == 0x5a5a5a5a5a5a5a5a) == (i == 0));
    CHECK(older.update_rms_tensor == 0x5a5a5a5a && older.update_rms_max > 1e15f);
  }
  older.struct_size = offsetof(mxt_step_stats, update_rms_tensor);
  RETURNS(MXT_ERROR_STRUCT_SIZE, mxt_trainer_step(trainer, dataset, &older));

  /* Steps 8 to 14, of which four are even. */
  struct seen seen = {trainer, model, 0};
  mxt_run_options run;
  OK(mxt_run_options_init(&run, sizeof run));
  run.steps = 7;
  run.on_step = see;
  run.user_data = &seen;
  OK(mxt_trainer_run(trainer, dataset, &run, NULL));
  CHECK(seen.watched == 4);

  OK(mxt_trainer_watch_updates(trainer, UINT64_MAX));
  no_update_yet(trainer);
  OK(mxt_trainer_watch_updates(trainer, 1));
  stats = step(trainer, dataset);
  check_updates(trainer, model, &stats);
  OK(mxt_trainer_watch_updates(trainer, 0));
  no_update_yet(trainer);
  stats = step(trainer, dataset);
  CHECK(is_unwatched(&stats));

  /* Moments that have just taken in their first gradient have seen it coming. */
  mxt_trainer *first = new_trainer(model);
  OK(mxt_trainer_watch_updates(first, 1));
  stats = step(first, dataset);
  check_updates(first, model, &stats);
  CHECK(stats.update_rms_max > 0.9f && stats.update_rms_max < 1.0001f);
  mxt_trainer_free(first);

  /* Muon's matrices have no second moment. */
  mxt_trainer_options options = small_options();
  options.optimizer = "muon";
  OK(mxt_trainer_new(model, &options, &first));
  OK(mxt_trainer_watch_updates(first, 1));
  stats = step(first, dataset);
  check_updates(first, model, &stats);
  CHECK(isnan(update_of(first, QKV).rms) && update_of(first, QKV).grad_norm > 0);
  mxt_trainer_free(first);

  mxt_trainer_free(plain);
  mxt_trainer_free(trainer);
  mxt_model_free(other_model);
  mxt_model_free(model);
}

/* While tokens are sampled the model is in use, and with it the trainer. */
static int32_t busy(void *user_data, uint32_t token) {
  mxt_tensor_update update;
  update.struct_size = sizeof update;
  (void)token;
  FAILS(MXT_ERROR_BUSY, "another call", mxt_trainer_watch_updates(user_data, 1));
  FAILS(MXT_ERROR_BUSY, "another call", mxt_trainer_tensor_update(user_data, WTE, &update));
  return 1;
}

int main(void) {
  mxt_engine *engine = new_engine();
  mxt_dataset *dataset = new_dataset();
  updates(engine, dataset);

  mxt_model *model = new_model(engine);
  mxt_trainer *trainer = new_trainer(model);
  mxt_generate_options generate;
  OK(mxt_generate_options_init(&generate, sizeof generate));
  generate.on_token = busy;
  generate.user_data = trainer;
  const uint32_t prompt = 1;
  size_t written = 0;
  OK(mxt_model_generate(model, &generate, &prompt, 1, NULL, 0, &written));
  CHECK(written == 1);

  mxt_trainer_free(trainer);
  mxt_model_free(model);
  mxt_dataset_free(dataset);
  mxt_engine_free(engine);
  return 0;
}
