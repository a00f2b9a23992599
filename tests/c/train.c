/* The main road: train, evaluate, save, resume bit for bit, tensors by name, generate, plan. */
#include "check.h"

#include <math.h>
#include <stddef.h>

static void log_line(void *user_data, int32_t level, const char *message) {
  CHECK(level >= MXT_LOG_LEVEL_WARNING && level <= MXT_LOG_LEVEL_DEBUG && message[0] != 0);
  *(int *)user_data += 1;
}

static int32_t stop_after_three(void *user_data, uint32_t token) {
  CHECK(token < VOCABULARY);
  return ++*(int *)user_data == 3;
}

/* A recipe with switches makes a step, and is kept as it was written. */
static void a_recipe_with_switches(mxt_model *model, mxt_dataset *dataset) {
  mxt_trainer *trainer = NULL;
  mxt_trainer_options options = small_options();
  options.recipe = "mxfp4-rht,range=3/4";
  OK(mxt_trainer_new(model, &options, &trainer));
  CHECK(step(trainer, dataset).loss > 0);
  mxt_trainer_options kept;
  kept.struct_size = sizeof kept;
  OK(mxt_trainer_get_options(trainer, &kept));
  CHECK(strcmp(kept.recipe, options.recipe) == 0);
  mxt_trainer_free(trainer);
}

/* Evaluations of a recipe that merges channels say what that would spare; nothing trains by it. */
static void merged_channels(mxt_model *model, mxt_dataset *dataset) {
  double products[2];
  const char *const recipes[] = {"bf16,haste=1", "bf16,haste=64"};
  for (int i = 0; i < 2; i++) {
    mxt_trainer *trainer = NULL;
    mxt_trainer_options options = small_options();
    options.recipe = recipes[i];
    OK(mxt_trainer_new(model, &options, &trainer));
    FAILS(MXT_ERROR_INVALID_ARGUMENT, "haste", mxt_trainer_step(trainer, dataset, NULL));
    mxt_eval_stats eval;
    eval.struct_size = sizeof eval;
    OK(mxt_trainer_eval(trainer, dataset, 2, &eval));
    CHECK(eval.loss > 0 && isnan(eval.sharpness) && eval.spared_all < eval.spared_products);
    products[i] = eval.spared_products;
    /* A program that knows no more than sharpness. */
    mxt_eval_stats older;
    older.struct_size = offsetof(mxt_eval_stats, spared_products);
    older.spared_products = older.spared_all = 77;
    OK(mxt_trainer_eval(trainer, dataset, 2, &older));
    CHECK(older.loss == eval.loss && isnan(older.logit_amax));
    CHECK(older.spared_products == 77 && older.spared_all == 77);
    mxt_trainer_free(trainer);
  }
  /* Hashes of one bit leave two of 16 channels or more. */
  CHECK(products[0] >= 1 - 2.0 / 16 && products[0] < 1);
  CHECK(products[1] >= 0 && products[1] < products[0]);
}

int main(int argc, char **argv) {
  CHECK(argc == 2);
  const char *checkpoint = in_folder(argv[1], "checkpoint");

  CHECK(mxt_version_number() == MXT_VERSION_NUMBER && mxt_abi_version() == MXT_ABI_VERSION);
  CHECK(strstr(mxt_build_info(), mxt_version()) != NULL);
  CHECK(strstr(mxt_build_info(), "\"selected\":") != NULL);

  int lines = 0;
  mxt_engine_options engine_options;
  mxt_engine *engine = NULL;
  OK(mxt_engine_options_init(&engine_options, sizeof engine_options));
  engine_options.threads = 2;
  engine_options.seed = 5;
  engine_options.log = log_line;
  engine_options.log_user_data = &lines;
  OK(mxt_engine_new(&engine_options, &engine));
  CHECK(mxt_engine_seed(engine) == 5 && mxt_engine_threads(engine) == 2 && lines > 0);

  mxt_memory_plan plan;
  plan.struct_size = sizeof plan;
  const mxt_model_config config = small_config();
  const mxt_trainer_options options = small_options();
  OK(mxt_plan(engine, &config, &options, &plan));
  CHECK(plan.weights > 0 && plan.optimizer > 0 && plan.total > plan.activations);
  CHECK(plan.total ==
        plan.weights + plan.gradients + plan.optimizer + plan.activations + plan.workspace);

  mxt_model *model = new_model(engine);
  mxt_dataset *dataset = new_dataset();
  a_recipe_with_switches(model, dataset);
  merged_channels(model, dataset);
  mxt_trainer *trainer = new_trainer(model);

  mxt_model_config seen;
  seen.struct_size = sizeof seen;
  OK(mxt_model_get_config(model, &seen));
  CHECK(seen.vocab_size == VOCABULARY && seen.layers == 1 && seen.channels == 16);
  uint64_t parameters = 0;
  for (size_t i = 0; i < mxt_model_tensor_count(model); i++) {
    mxt_tensor_info info;
    info.struct_size = sizeof info;
    OK(mxt_model_tensor_info(model, i, &info));
    uint64_t product = 1;
    for (uint32_t d = 0; d < info.rank; d++) product *= info.shape[d];
    CHECK(info.rank >= 1 && info.rank <= MXT_MAX_RANK && product == info.element_count);
    CHECK(info.dtype == MXT_DTYPE_F32);
    float *values = malloc((size_t)product * sizeof *values);
    CHECK(values != NULL);
    OK(mxt_model_tensor_read(model, info.name, values, (size_t)product));
    OK(mxt_model_tensor_write(model, info.name, values, (size_t)product));
    free(values);
    parameters += product;
  }
  CHECK(parameters == mxt_model_parameter_count(model));

  mxt_trainer_options kept;
  kept.struct_size = sizeof kept;
  OK(mxt_trainer_get_options(trainer, &kept));
  CHECK(strcmp(kept.recipe, "mxfp4-rht-sr") == 0 && kept.batch_size == BATCH);
  CHECK(strcmp(kept.optimizer, "adamw") == 0 && kept.token_drop == NULL);
  CHECK(kept.lr == options.lr && kept.schedule == MXT_SCHEDULE_CONSTANT);

  const float first = step(trainer, dataset).loss;
  for (int i = 1; i < 60; i++) step(trainer, dataset);
  mxt_eval_stats eval;
  eval.struct_size = sizeof eval;
  OK(mxt_trainer_eval(trainer, dataset, 4, &eval));
  CHECK(eval.loss < first && eval.perplexity > 1 && eval.tokens == 4 * BATCH * CONTEXT);
  CHECK(mxt_trainer_steps_done(trainer) == 60);
  CHECK(isnan(eval.sharpness) && isnan(eval.logit_amax));
  CHECK(isnan(eval.spared_products) && isnan(eval.spared_all));
  const float plain = eval.loss;
  OK(mxt_trainer_set_sharpness(trainer, 1e-3f));
  OK(mxt_trainer_eval(trainer, dataset, 4, &eval));
  CHECK(eval.loss == plain && eval.sharpness > 0 && eval.sharpness_last > 0);
  CHECK(eval.sharpness_epsilon == 1e-3f && eval.logit_amax > 0);
  /* A program that knows no more than the loss. */
  mxt_eval_stats older;
  older.struct_size = offsetof(mxt_eval_stats, sharpness);
  older.sharpness = 77;
  OK(mxt_trainer_eval(trainer, dataset, 4, &older));
  CHECK(older.loss == plain && older.sharpness == 77);
  OK(mxt_trainer_set_sharpness(trainer, 0));

  /* The same losses with and without a stop in between. */
  OK(mxt_trainer_set_lr(trainer, 5e-3f));
  OK(mxt_trainer_save(trainer, checkpoint));
  float losses[5];
  for (int i = 0; i < 5; i++) losses[i] = step(trainer, dataset).loss;
  mxt_trainer_free(trainer);
  OK(mxt_trainer_load(engine, checkpoint, &trainer));
  CHECK(mxt_trainer_steps_done(trainer) == 60);
  OK(mxt_trainer_get_options(trainer, &kept));
  CHECK(kept.batch_size == BATCH && kept.lr == options.lr);
  for (int i = 0; i < 5; i++) {
    const mxt_step_stats stats = step(trainer, dataset);
    CHECK(stats.loss == losses[i] && stats.lr == 5e-3f);
    CHECK(stats.tokens == BATCH * CONTEXT && stats.seconds > 0 && stats.tokens_per_second > 0);
  }
  OK(mxt_trainer_use_schedule(trainer));
  CHECK(step(trainer, dataset).lr == options.lr);

  /* A snapshot is the trainer as it was, whatever that does since; it can be made anew. */
  mxt_snapshot *snapshot = NULL;
  const char *aside = in_folder(argv[1], "aside");
  for (int i = 0; i < 2; i++) {
    const uint64_t before = mxt_trainer_steps_done(trainer);
    if (i == 0) OK(mxt_trainer_snapshot(trainer, &snapshot));
    else OK(mxt_snapshot_renew(snapshot, trainer));
    const float loss = step(trainer, dataset).loss;
    FAILS(MXT_ERROR_IO, "/dev/null", mxt_snapshot_save(snapshot, "/dev/null/x"));
    CHECK(strstr(mxt_snapshot_last_error(snapshot), "/dev/null") != NULL);
    OK(mxt_snapshot_save(snapshot, aside));
    mxt_trainer *then = NULL;
    OK(mxt_trainer_load(engine, aside, &then));
    CHECK(mxt_trainer_steps_done(then) == before && step(then, dataset).loss == loss);
    mxt_trainer_free(then);
  }
  mxt_snapshot_free(snapshot);

  /* Another optimizer, by its name, which is kept with the run. */
  const char *other = in_folder(argv[1], "stable");
  mxt_trainer_options other_options = options;
  mxt_trainer *stable = NULL;
  other_options.optimizer = "stable-adamw";
  other_options.clip = 0;
  OK(mxt_trainer_new(model, &other_options, &stable));
  step(stable, dataset);
  OK(mxt_trainer_save(stable, other));
  const float next = step(stable, dataset).loss;
  mxt_trainer_free(stable);
  OK(mxt_trainer_load(engine, other, &stable));
  OK(mxt_trainer_get_options(stable, &kept));
  CHECK(strcmp(kept.optimizer, "stable-adamw") == 0 && kept.clip == 0);
  CHECK(step(stable, dataset).loss == next);
  mxt_trainer_free(stable);

  /* The same run goes on with smaller moments, but not with another optimizer. */
  FAILS(MXT_ERROR_INVALID_ARGUMENT, "stable-adamw",
        mxt_trainer_load_as(engine, other, "adamw", &stable));
  FAILS(MXT_ERROR_INVALID_ARGUMENT, "moments",
        mxt_trainer_load_as(engine, other, "adamw,moments=x", &stable));
  const char *const smaller[] = {"stable-adamw,moments=fp8", "stable-adamw,moments=int8"};
  for (int i = 0; i < 2; i++) {
    OK(mxt_trainer_load_as(engine, other, smaller[i], &stable));
    OK(mxt_trainer_get_options(stable, &kept));
    CHECK(strcmp(kept.optimizer, smaller[i]) == 0 && kept.clip == 0);
    CHECK(fabsf(step(stable, dataset).loss - next) < 1e-3f);
    mxt_trainer_free(stable);
  }
  OK(mxt_trainer_step(trainer, dataset, NULL));

  /* A new schedule counts its steps from where it was set, also after a save and a load. */
  OK(mxt_trainer_set_lr(trainer, 5e-3f));
  kept.schedule = MXT_SCHEDULE_LINEAR;
  kept.lr = 4e-3f;
  kept.min_lr = 0;
  kept.warmup_steps = 2;
  kept.total_steps = 6;
  OK(mxt_trainer_set_schedule(trainer, &kept));
  const uint64_t start = mxt_trainer_steps_done(trainer);
  CHECK(mxt_trainer_schedule_start(trainer) == start);
  CHECK(step(trainer, dataset).lr == 2e-3f);
  OK(mxt_trainer_save(trainer, checkpoint));
  mxt_trainer_free(trainer);
  OK(mxt_trainer_load(engine, checkpoint, &trainer));
  CHECK(mxt_trainer_schedule_start(trainer) == start);
  OK(mxt_trainer_get_options(trainer, &kept));
  CHECK(kept.schedule == MXT_SCHEDULE_LINEAR && kept.total_steps == 6);
  const float rates[] = {4e-3f, 4e-3f, 3e-3f, 2e-3f, 1e-3f, 0};
  for (int i = 0; i < 6; i++) {
    const float difference = step(trainer, dataset).lr - rates[i];
    CHECK(difference < 1e-9f && difference > -1e-9f);
  }

  mxt_model *trained = NULL;
  OK(mxt_trainer_model(trainer, &trained));
  mxt_model_free(trained);
  OK(mxt_model_load(engine, checkpoint, &trained));

  /* Greedy text is the same every time; a callback can end it; one buffer can hold all of it. */
  mxt_generate_options generate;
  OK(mxt_generate_options_init(&generate, sizeof generate));
  generate.max_tokens = 30; /* longer than the context */
  generate.temperature = 0;
  uint32_t text[32] = {3, 4}, again[30];
  size_t written = 0;
  OK(mxt_model_generate(trained, &generate, text, 2, text + 2, 30, &written));
  CHECK(written == 30);
  OK(mxt_model_generate(trained, &generate, text, 2, again, 30, &written));
  CHECK(written == 30 && memcmp(text + 2, again, sizeof again) == 0);
  /* A stop token ends the text and is its last token. */
  generate.stop_tokens = &again[0];
  generate.stop_token_count = 1;
  OK(mxt_model_generate(trained, &generate, text, 2, text + 2, 30, &written));
  CHECK(written == 1 && text[2] == again[0]);
  generate.stop_token_count = 0;
  int count = 0;
  generate.on_token = stop_after_three;
  generate.user_data = &count;
  OK(mxt_model_generate(trained, &generate, text, 2, NULL, 0, &written));
  CHECK(written == 3 && count == 3);

  mxt_model_free(trained);
  mxt_model_free(model);
  mxt_dataset_free(dataset);
  mxt_trainer_free(trainer);
  mxt_engine_free(engine);
  return 0;
}
