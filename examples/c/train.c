/* Trains a small GPT from C: opens a dataset, trains, saves, resumes, and lets the model write.
 *
 *   cargo build --release
 *   cc -std=c99 examples/c/train.c -Iinclude -Ltarget/release -lmxfp4train -o train
 *   ln -s libmxfp4train.so target/release/libmxfp4train.so.0
 *   LD_LIBRARY_PATH=target/release ./train [TOKENS.bin]
 *
 * TOKENS.bin holds bytes as 16-bit tokens, or any tokens below 50257. Without it the program learns
 * a nursery rhyme by heart. */
#include "mxfp4train.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static const char rhyme[] =
    "Humpty Dumpty sat on a wall, Humpty Dumpty had a great fall; "
    "all the king's horses and all the king's men could not put Humpty together again. ";

/* Ends the program with the library's message when a call failed. */
static void check(mxt_status status) {
  if (status == MXT_OK) return;
  fprintf(stderr, "%s: %s\n", mxt_status_string(status), mxt_last_error());
  exit(1);
}

/* Called by mxt_trainer_run after every step; another number than 0 would end the run. */
static int32_t print_step(void *user_data, const mxt_step_stats *step, const mxt_eval_stats *eval) {
  const uint64_t every = *(const uint64_t *)user_data;
  if (step->step % every == 0) {
    printf("step %4llu  loss %.4f  norm %.3f  lr %.1e  %.0f tokens/s\n",
           (unsigned long long)step->step, (double)step->loss, (double)step->grad_norm,
           (double)step->lr, (double)step->tokens_per_second);
  }
  if (eval != NULL) printf("           evaluation %.4f nats a token\n", (double)eval->loss);
  return 0;
}

/* Called by mxt_model_generate for every token. */
static int32_t print_token(void *user_data, uint32_t token) {
  (void)user_data;
  putchar(token < 256 ? (int)token : '?');
  return 0;
}

static mxt_dataset *open_tokens(const char *path) {
  mxt_dataset *dataset = NULL;
  if (path != NULL) {
    check(mxt_dataset_open(path, &dataset));
    return dataset;
  }
  uint32_t tokens[8192];
  for (size_t i = 0; i < 8192; i++) tokens[i] = (unsigned char)rhyme[i % (sizeof rhyme - 1)];
  check(mxt_dataset_from_tokens(tokens, 8192, &dataset));
  return dataset;
}

int main(int argc, char **argv) {
  const char *checkpoint = "checkpoint";
  uint64_t print_every = 20;
  printf("mxfp4train %s\n", mxt_version());

  mxt_engine *engine = NULL;
  check(mxt_engine_new(NULL, &engine));
  mxt_dataset *dataset = open_tokens(argc > 1 ? argv[1] : NULL);
  uint32_t max_token = 0;
  check(mxt_dataset_max_token(dataset, &max_token));

  mxt_model_config config;
  check(mxt_model_config_init(&config, sizeof config));
  config.vocab_size = (size_t)max_token + 1;
  config.context_length = 64;
  config.layers = 2;
  config.heads = 4;
  config.channels = 64;
  mxt_model *model = NULL;
  check(mxt_model_new(engine, &config, &model));
  printf("%llu parameters, %llu tokens\n", (unsigned long long)mxt_model_parameter_count(model),
         (unsigned long long)mxt_dataset_token_count(dataset));

  mxt_trainer_options options;
  check(mxt_trainer_options_init(&options, sizeof options));
  options.recipe = "mxfp4-rht-sr"; /* forward in bf16, backward in MXFP4 */
  options.batch_size = 8;
  options.schedule = MXT_SCHEDULE_COSINE;
  options.lr = 3e-3f;
  options.warmup_steps = 10;
  options.total_steps = 200;
  mxt_trainer *trainer = NULL;
  check(mxt_trainer_new(model, &options, &trainer));

  /* The first steps one by one: this is all that a loop of your own needs. */
  for (int i = 0; i < 3; i++) {
    mxt_step_stats stats;
    stats.struct_size = sizeof stats;
    check(mxt_trainer_step(trainer, dataset, &stats));
    printf("step %4llu  loss %.4f\n", (unsigned long long)stats.step, (double)stats.loss);
  }

  /* Half of the rest in one call, which ends with a checkpoint. */
  mxt_run_options run;
  check(mxt_run_options_init(&run, sizeof run));
  run.steps = 97;
  run.eval_dataset = dataset;
  run.eval_batches = 4;
  run.save_dir = checkpoint;
  run.on_step = print_step;
  run.user_data = &print_every;
  check(mxt_trainer_run(trainer, dataset, &run, NULL));
  mxt_trainer_free(trainer);
  mxt_model_free(model);

  /* As another process would: everything comes back from the checkpoint. */
  check(mxt_trainer_load(engine, checkpoint, &trainer));
  printf("resumed at step %llu\n", (unsigned long long)mxt_trainer_steps_done(trainer));
  run.steps = options.total_steps - mxt_trainer_steps_done(trainer);
  mxt_run_result result;
  result.struct_size = sizeof result;
  check(mxt_trainer_run(trainer, dataset, &run, &result));
  printf("%llu steps, last loss %.4f\n", (unsigned long long)result.steps,
         (double)result.last_loss);

  mxt_generate_options generate;
  check(mxt_generate_options_init(&generate, sizeof generate));
  generate.temperature = 0.5f;
  generate.on_token = print_token;
  uint32_t prompt[] = {'H'}, text[256];
  size_t written = 0;
  check(mxt_trainer_model(trainer, &model));
  putchar('H');
  check(mxt_model_generate(model, &generate, prompt, 1, text, 256, &written));
  putchar('\n');

  mxt_model_free(model);
  mxt_trainer_free(trainer);
  mxt_dataset_free(dataset);
  mxt_engine_free(engine);
  return 0;
}
