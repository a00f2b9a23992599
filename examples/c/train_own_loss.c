/* Trains on a loss of its own, and on answers alone: a small model learns to add. Of "7+9=16" only
   what follows the "=" counts, and the loss is cross-entropy with label smoothing, made here from
   the logits. Each step is two batches.

     cargo build --release
     cc -Iinclude examples/c/train_own_loss.c -o train_own_loss -Ltarget/release -lmxfp4train -lm
     ln -s libmxfp4train.so target/release/libmxfp4train.so.0
     LD_LIBRARY_PATH=target/release ./train_own_loss */
#include "mxfp4train.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { SUMS = 64, LENGTH = 8, ROWS = SUMS * LENGTH, STEPS = 400 };

#define TRY(call) \
  do { \
    if ((call) != MXT_OK) { \
      fprintf(stderr, "%s\n", mxt_last_error()); \
      exit(1); \
    } \
  } while (0)

/* One batch of sums: each predicts its next byte, and only those of the answer count. */
static uint32_t tokens[ROWS], targets[ROWS];

static void make_sums(void) {
  for (int row = 0; row < SUMS; row++) {
    const int a = rand() % 10, b = rand() % 10;
    char text[16] = {0};
    snprintf(text, sizeof text, "%d+%d=%d\n", a, b, a + b);
    for (int i = 0; i < LENGTH; i++) {
      const int is_answer = i >= 3 && text[i + 1] != 0;
      tokens[row * LENGTH + i] = (unsigned char)text[i];
      targets[row * LENGTH + i] = is_answer ? (unsigned char)text[i + 1] : MXT_IGNORED;
    }
  }
}

/* Cross-entropy with label smoothing: logits come in, their gradients go out. */
static int32_t smoothed(void *user_data, const mxt_logits *rows) {
  const double smoothing = *(const double *)user_data;
  for (uint64_t row = 0; row < rows->rows; row++) {
    float *y = rows->logits + row * rows->vocab_size;
    const uint32_t target = targets[rows->first_row + row];
    const double even = smoothing / (double)rows->vocab_size;
    double most = y[0], sum = 0.0, loss = 0.0;
    for (uint64_t v = 1; v < rows->vocab_size; v++) most = y[v] > most ? y[v] : most;
    for (uint64_t v = 0; v < rows->vocab_size; v++) sum += exp(y[v] - most);
    for (uint64_t v = 0; v < rows->vocab_size; v++) {
      const double wanted = even + (v == target ? 1.0 - smoothing : 0.0);
      const double log_probability = y[v] - most - log(sum);
      loss -= wanted * log_probability;
      y[v] = (float)(exp(log_probability) - wanted);
    }
    rows->losses[row] = (float)loss;
  }
  return 0; /* another number would stop */
}

/* How many of all hundred sums the model gets right. */
static int right_answers(const mxt_model *model) {
  int right = 0;
  for (int i = 0; i < 100; i++) {
    char text[16];
    uint32_t prompt[LENGTH];
    size_t length = (size_t)snprintf(text, sizeof text, "%d+%d=", i / 10, i % 10);
    for (size_t at = 0; at < length; at++) prompt[at] = (unsigned char)text[at];
    char answer[4] = {0}, expected[16];
    for (int digit = 0; digit < 3; digit++) {
      float logits[128];
      int best = 0;
      TRY(mxt_model_next_logits(model, prompt, length, logits, 128));
      for (int v = 1; v < 128; v++) best = logits[v] > logits[best] ? v : best;
      if (best == '\n') break;
      prompt[length++] = (uint32_t)best;
      answer[digit] = (char)best;
    }
    snprintf(expected, sizeof expected, "%d", i / 10 + i % 10);
    right += strcmp(answer, expected) == 0;
  }
  return right;
}

int main(void) {
  mxt_engine *engine = NULL;
  mxt_model *model = NULL;
  mxt_trainer *trainer = NULL;
  mxt_model_config shape;
  mxt_trainer_options options;
  double smoothing = 0.1;

  TRY(mxt_engine_new(NULL, &engine));
  TRY(mxt_model_config_init(&shape, sizeof shape));
  shape.vocab_size = 128, shape.context_length = LENGTH;
  shape.layers = 2, shape.heads = 2, shape.channels = 64;
  TRY(mxt_model_new(engine, &shape, &model));
  TRY(mxt_trainer_options_init(&options, sizeof options));
  options.batch_size = SUMS;
  options.lr = 3e-3f;
  options.schedule = MXT_SCHEDULE_COSINE;
  options.warmup_steps = 20, options.total_steps = STEPS;
  TRY(mxt_trainer_new(model, &options, &trainer));

  mxt_batch batch;
  TRY(mxt_batch_init(&batch, sizeof batch));
  batch.count = ROWS;
  batch.tokens = tokens;
  batch.targets = targets;
  batch.loss = smoothed;
  batch.user_data = &smoothing;
  for (int step = 0; step < STEPS; step++) {
    for (int i = 0; i < 2; i++) {
      make_sums();
      TRY(mxt_trainer_forward_backward(trainer, &batch));
    }
    mxt_step_stats stats;
    stats.struct_size = sizeof stats;
    TRY(mxt_trainer_update(trainer, &stats));
    if (stats.step % 50 == 0) printf("step %3d  loss %.3f\n", (int)stats.step, stats.loss);
  }
  printf("%d of 100 sums are right\n", right_answers(model));

  mxt_trainer_free(trainer);
  mxt_model_free(model);
  mxt_engine_free(engine);
  return 0;
}
