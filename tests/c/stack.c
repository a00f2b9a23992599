/* Every call on a thread with the smallest stack that the header allows. */
#define _GNU_SOURCE
#include "check.h"

#include <pthread.h>
#include <sys/stat.h>
#include <unistd.h>

/* Bytes, as the header says; less for measuring. */
#ifndef STACK
#define STACK (128 << 10)
#endif

static const char *folder;

static int32_t on_step(void *user_data, const mxt_step_stats *stats, const mxt_eval_stats *eval) {
  (void)stats, (void)eval;
  *(int *)user_data += 1;
  return 0;
}

static void *live(void *nothing) {
  char checkpoint[512], tokens_file[512], pattern[512];
  mxt_engine *engine = new_engine();
  mxt_model *model = new_model(engine), *other_model = NULL;
  mxt_trainer *trainer = new_trainer(model), *other_trainer = NULL;
  mxt_dataset *other_dataset = NULL;
  const mxt_model_config config = small_config();
  const mxt_trainer_options options = small_options();
  mxt_run_options run;
  mxt_memory_plan plan;
  mxt_eval_stats eval;
  static uint32_t tokens[DATA];
  static float values[16 * 48];
  static uint16_t words[DATA];
  size_t written = 0;
  int steps = 0;
  uint32_t text[8], largest;
  mxt_dataset *dataset = NULL;

  snprintf(checkpoint, sizeof checkpoint, "%s/checkpoint", folder);
  snprintf(tokens_file, sizeof tokens_file, "%s/tokens.bin", folder);
  snprintf(pattern, sizeof pattern, "%s/[t]*.bin", folder);
  for (int i = 0; i < DATA; i++) words[i] = (uint16_t)(tokens[i] = (uint32_t)(i % 29));
  FILE *file = fopen(tokens_file, "wb");
  CHECK(file != NULL && fwrite(words, sizeof words, 1, file) == 1 && fclose(file) == 0);

  CHECK(mxt_build_info()[0] == '{');
  OK(mxt_dataset_from_tokens(tokens, DATA, &dataset));
  OK(mxt_dataset_open(pattern, &other_dataset));
  OK(mxt_dataset_max_token(other_dataset, &largest));
  step(trainer, dataset);
  eval.struct_size = sizeof eval;
  OK(mxt_trainer_eval(trainer, other_dataset, 2, &eval));
  OK(mxt_trainer_save(trainer, checkpoint));
  OK(mxt_trainer_save(trainer, checkpoint));
  OK(mxt_trainer_load(engine, checkpoint, &other_trainer));
  OK(mxt_model_load(engine, checkpoint, &other_model));
  OK(mxt_model_generate(model, NULL, text, 1, NULL, 0, &written));
  OK(mxt_model_next_logits(model, text, 1, values, VOCABULARY));
  OK(mxt_model_tensor_read(model, "transformer.h.0.attn.c_attn.weight", values, 16 * 48));
  OK(mxt_model_tensor_write(model, "transformer.h.0.attn.c_attn.weight", values, 16 * 48));
  plan.struct_size = sizeof plan;
  OK(mxt_plan(engine, &config, &options, &plan));
  OK(mxt_run_options_init(&run, sizeof run));
  run.steps = 2;
  run.eval_dataset = other_dataset;
  run.save_dir = checkpoint;
  run.on_step = on_step;
  run.user_data = &steps;
  OK(mxt_trainer_run(trainer, dataset, &run, NULL));
  CHECK(steps == 2);
  FAILS(MXT_ERROR_INVALID_ARGUMENT, "lr", mxt_trainer_set_lr(trainer, -1));
  FAILS(MXT_ERROR_IO, "nothing", mxt_model_load(engine, "/nothing/here", &other_model));

  /* A file that nests as deeply as a parser goes. */
  char path[600];
  snprintf(path, sizeof path, "%s/config.json", checkpoint);
  file = fopen(path, "w");
  CHECK(file != NULL && fputs("{\"a\": ", file) >= 0);
  for (int i = 0; i < 120; i++) CHECK(fputc('[', file) == '[');
  for (int i = 0; i < 120; i++) CHECK(fputc(']', file) == ']');
  CHECK(fputs("}", file) >= 0 && fclose(file) == 0);
  RETURNS(MXT_ERROR_FORMAT, mxt_model_load(engine, checkpoint, &other_model));

  mxt_trainer_free(trainer);
  mxt_trainer_free(other_trainer);
  mxt_model_free(model);
  mxt_model_free(other_model);
  mxt_dataset_free(dataset);
  mxt_dataset_free(other_dataset);
  mxt_engine_free(engine);
  return nothing;
}

int main(int argc, char **argv) {
  pthread_attr_t attributes;
  pthread_t thread;
  CHECK(argc == 2);
  folder = argv[1];
  CHECK(pthread_attr_init(&attributes) == 0);
  CHECK(pthread_attr_setstacksize(&attributes, STACK) == 0);
  CHECK(pthread_create(&thread, &attributes, live, NULL) == 0);
  CHECK(pthread_join(thread, NULL) == 0);
  CHECK(pthread_attr_destroy(&attributes) == 0);
  return 0;
}
