/* The smallest program that trains: a model learns to count. */
#include <mxfp4train.h>

#include <stdio.h>
#include <stdlib.h>

static void check(mxt_status status) {
  if (status == MXT_OK) return;
  fprintf(stderr, "%s\n", mxt_last_error());
  exit(1);
}

int main(void) {
  if (mxt_version_number() != MXT_VERSION_NUMBER || mxt_abi_version() != MXT_ABI_VERSION) return 2;
  mxt_engine *engine = NULL;
  check(mxt_engine_new(NULL, &engine));
  mxt_model_config config;
  check(mxt_model_config_init(&config, sizeof config));
  config.vocab_size = 16;
  config.context_length = 16;
  config.layers = 1;
  config.heads = 2;
  config.channels = 32;
  mxt_model *model = NULL;
  check(mxt_model_new(engine, &config, &model));
  mxt_trainer_options options;
  check(mxt_trainer_options_init(&options, sizeof options));
  options.lr = 1e-2f;
  mxt_trainer *trainer = NULL;
  check(mxt_trainer_new(model, &options, &trainer));
  uint32_t tokens[1000];
  for (uint32_t i = 0; i < 1000; i++) tokens[i] = i % 16;
  mxt_dataset *dataset = NULL;
  check(mxt_dataset_from_tokens(tokens, 1000, &dataset));

  mxt_step_stats stats;
  stats.struct_size = sizeof stats;
  for (int i = 0; i < 60; i++) check(mxt_trainer_step(trainer, dataset, &stats));
  mxt_trainer_free(trainer);
  mxt_model_free(model);
  mxt_dataset_free(dataset);
  mxt_engine_free(engine);
  printf("mxfp4train %s: loss %.3f\n", mxt_version(), (double)stats.loss);
  return stats.loss < 1 ? 0 : 3;
}
