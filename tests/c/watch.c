/* What a trainer watches: what updates do to tensors, and how weights change. */
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

static mxt_weight_metrics metrics_of(mxt_trainer *trainer, const char *tensor) {
  mxt_weight_metrics metrics;
  metrics.struct_size = sizeof metrics;
  OK(mxt_trainer_weight_metrics(trainer, tensor, &metrics));
  CHECK(metrics.struct_size == sizeof metrics);
  return metrics;
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

static void no_window_yet(mxt_trainer *trainer) {
  mxt_weight_metrics metrics;
  metrics.struct_size = sizeof metrics;
  metrics.step = 77;
  FAILS(MXT_ERROR_INVALID_ARGUMENT, "call mxt_trainer_watch_weights",
        mxt_trainer_weight_metrics(trainer, NULL, &metrics));
  FAILS(MXT_ERROR_INVALID_ARGUMENT, "call mxt_trainer_watch_weights",
        mxt_trainer_weight_metrics(trainer, QKV, &metrics));
  CHECK(metrics.step == 77);
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

enum { QKV_COUNT = 16 * 48 };

static void weights(const mxt_engine *engine, const mxt_dataset *dataset) {
  mxt_model *model = new_model(engine), *other_model = new_model(engine);
  mxt_trainer *trainer = new_trainer(model), *plain = NULL;
  FAILS(MXT_ERROR_INVALID_ARGUMENT, "recipe: expected", mxt_trainer_watch_weights(trainer, 2));
  OK(mxt_trainer_watch_weights(trainer, 0));
  no_window_yet(trainer);
  mxt_trainer_free(trainer);

  mxt_trainer_options options = small_options();
  options.recipe = "tetrajet";
  OK(mxt_trainer_new(model, &options, &trainer));
  OK(mxt_trainer_new(other_model, &options, &plain));
  no_window_yet(trainer);
  OK(mxt_trainer_watch_weights(trainer, 2));
  CHECK(step(trainer, dataset).loss == step(plain, dataset).loss);
  no_window_yet(trainer);
  CHECK(step(trainer, dataset).loss == step(plain, dataset).loss);
  const mxt_weight_metrics all = metrics_of(trainer, NULL);
  CHECK(all.step == 2 && all.steps == 2 && all.tensors == 4);
  CHECK(all.change > 0 && all.rounded_change > 0 && all.flipped > 0 && all.flipped < 1);
  CHECK(all.confidence > 0 && all.confidence < 1 && all.clipped == 0);
  CHECK(all.oscillating >= 0 && all.oscillating <= 1);
  uint32_t watched = 0;
  double flips = 0, count = 0;
  float amax = 0;
  mxt_weight_metrics metrics;
  for (size_t i = 0; i < mxt_model_tensor_count(model); i++) {
    mxt_tensor_info info;
    info.struct_size = sizeof info;
    OK(mxt_model_tensor_info(model, i, &info));
    if (info.rank == 2 && strstr(info.name, ".h.0.") != NULL) {
      metrics = metrics_of(trainer, info.name);
      CHECK(metrics.step == 2 && metrics.steps == 2 && metrics.tensors == 1);
      flips += metrics.flipped * (double)info.element_count, count += (double)info.element_count;
      if (metrics.amax > amax) amax = metrics.amax;
      watched++;
    } else {
      metrics.struct_size = sizeof metrics;
      FAILS(MXT_ERROR_INVALID_ARGUMENT, "such as \"" QKV "\"",
            mxt_trainer_weight_metrics(trainer, info.name, &metrics));
      CHECK(strstr(mxt_last_error(), info.name) != NULL);
    }
  }
  CHECK(watched == all.tensors && amax == all.amax && fabs(flips / count - all.flipped) < 1e-9);
  FAILS(MXT_ERROR_NO_SUCH_TENSOR, "no.such",
        mxt_trainer_weight_metrics(trainer, "no.such", &metrics));
  FAILS(MXT_ERROR_UTF8, "tensor", mxt_trainer_weight_metrics(trainer, "\xff", &metrics));
  metrics.struct_size = offsetof(mxt_weight_metrics, tensors);
  FAILS(MXT_ERROR_STRUCT_SIZE, "metrics", mxt_trainer_weight_metrics(trainer, NULL, &metrics));
  step(trainer, dataset);
  CHECK(metrics_of(trainer, NULL).step == 2);
  step(trainer, dataset);
  CHECK(metrics_of(trainer, NULL).step == 4);

  /* What one step changes, by the weights themselves. */
  static float before[QKV_COUNT], after[QKV_COUNT];
  OK(mxt_trainer_watch_weights(trainer, 1));
  no_window_yet(trainer);
  OK(mxt_model_tensor_read(model, QKV, before, QKV_COUNT));
  step(trainer, dataset);
  OK(mxt_model_tensor_read(model, QKV, after, QKV_COUNT));
  double moved = 0, length = 0;
  amax = 0;
  for (int i = 0; i < QKV_COUNT; i++) {
    const double x = before[i], y = after[i];
    moved += (y - x) * (y - x), length += x * x;
    if (fabsf(after[i]) > amax) amax = fabsf(after[i]);
  }
  metrics = metrics_of(trainer, QKV);
  CHECK(metrics.step == 5 && metrics.steps == 1 && metrics.amax == amax);
  CHECK(fabs(metrics.change / sqrt(moved / length) - 1) < 1e-5);

  OK(mxt_trainer_watch_weights(trainer, 0));
  no_window_yet(trainer);
  mxt_trainer_free(plain);
  mxt_trainer_free(trainer);
  mxt_model_free(other_model);
  mxt_model_free(model);
}

/* While tokens are sampled the model is in use, and with it the trainer. */
static int32_t busy(void *user_data, uint32_t token) {
  mxt_tensor_update update;
  mxt_weight_metrics metrics;
  update.struct_size = sizeof update;
  metrics.struct_size = sizeof metrics;
  (void)token;
  FAILS(MXT_ERROR_BUSY, "another call", mxt_trainer_watch_updates(user_data, 1));
  FAILS(MXT_ERROR_BUSY, "another call", mxt_trainer_tensor_update(user_data, WTE, &update));
  FAILS(MXT_ERROR_BUSY, "another call", mxt_trainer_watch_weights(user_data, 1));
  FAILS(MXT_ERROR_BUSY, "another call", mxt_trainer_weight_metrics(user_data, NULL, &metrics));
  return 1;
}

int main(void) {
  mxt_engine *engine = new_engine();
  mxt_dataset *dataset = new_dataset();
  updates(engine, dataset);
  weights(engine, dataset);

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
