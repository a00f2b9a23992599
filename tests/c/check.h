/* What the test programs share: checks that say where and why, and a model that trains fast. */
#ifndef CHECK_H
#define CHECK_H

#include "mxfp4train.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define CHECK(condition) \
  do { \
    if (!(condition)) { \
      fprintf(stderr, "%s:%d: failed: %s\n  last error: %s\n", __FILE__, __LINE__, #condition, \
              mxt_last_error()); \
      exit(1); \
    } \
  } while (0)

/* The call returns `code`. */
#define RETURNS(code, call) \
  do { \
    const mxt_status status_ = (call); \
    if (status_ != (code)) { \
      fprintf(stderr, "%s:%d: %s\n  returned %d (%s), expected %s\n  last error: %s\n", __FILE__, \
              __LINE__, #call, (int)status_, mxt_status_string(status_), #code, mxt_last_error()); \
      exit(1); \
    } \
  } while (0)

#define OK(call) RETURNS(MXT_OK, call)

/* The call returns `code` and its message contains `text` and starts with the function's name. */
#define FAILS(code, text, call) \
  do { \
    RETURNS(code, call); \
    CHECK(strstr(mxt_last_error(), text) != NULL); \
    CHECK(strncmp(mxt_last_error(), #call, strcspn(#call, "(")) == 0); \
  } while (0)

enum { VOCABULARY = 32, CONTEXT = 16, BATCH = 2, DATA = 4000 };

static inline mxt_engine *new_engine(void) {
  mxt_engine_options options;
  mxt_engine *engine = NULL;
  OK(mxt_engine_options_init(&options, sizeof options));
  options.threads = 1;
  OK(mxt_engine_new(&options, &engine));
  CHECK(engine != NULL);
  return engine;
}

static inline mxt_model_config small_config(void) {
  mxt_model_config config;
  OK(mxt_model_config_init(&config, sizeof config));
  config.vocab_size = VOCABULARY;
  config.context_length = CONTEXT;
  config.layers = 1;
  config.heads = 2;
  config.channels = 16;
  return config;
}

static inline mxt_model *new_model(const mxt_engine *engine) {
  const mxt_model_config config = small_config();
  mxt_model *model = NULL;
  OK(mxt_model_new(engine, &config, &model));
  CHECK(model != NULL);
  return model;
}

static inline mxt_trainer_options small_options(void) {
  mxt_trainer_options options;
  OK(mxt_trainer_options_init(&options, sizeof options));
  options.batch_size = BATCH;
  options.lr = 1e-2f;
  return options;
}

static inline mxt_trainer *new_trainer(mxt_model *model) {
  const mxt_trainer_options options = small_options();
  mxt_trainer *trainer = NULL;
  OK(mxt_trainer_new(model, &options, &trainer));
  CHECK(trainer != NULL);
  return trainer;
}

static inline mxt_dataset *new_dataset(void) {
  uint32_t tokens[DATA];
  mxt_dataset *dataset = NULL;
  for (uint32_t i = 0; i < DATA; i++) tokens[i] = (i * i + i / 7) % 29;
  OK(mxt_dataset_from_tokens(tokens, DATA, &dataset));
  CHECK(dataset != NULL);
  return dataset;
}

static inline mxt_step_stats step(mxt_trainer *trainer, const mxt_dataset *dataset) {
  mxt_step_stats stats;
  stats.struct_size = sizeof stats;
  OK(mxt_trainer_step(trainer, dataset, &stats));
  return stats;
}

/* "folder/name" in one of two static buffers. */
static inline const char *in_folder(const char *folder, const char *name) {
  static char buffers[2][4096];
  static int next = 0;
  char *buffer = buffers[next ^= 1];
  snprintf(buffer, sizeof buffers[0], "%s/%s", folder, name);
  return buffer;
}

#endif
