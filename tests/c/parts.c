/* A step in parts: masks, weights, a loss of the host's with label smoothing, gradients, an update;
   and hosts that do it wrong. */
#include "check.h"

#include <math.h>

enum { ROWS = BATCH * CONTEXT };

static uint32_t windows[BATCH * (CONTEXT + 1)], tokens[ROWS], targets[ROWS];
static float weights[ROWS], losses[ROWS];

static void fill(uint32_t seed) {
  for (uint32_t i = 0; i < BATCH * (CONTEXT + 1); i++) windows[i] = (i * i + seed * i + seed) % 29;
  for (int b = 0; b < BATCH; b++)
    for (int t = 0; t < CONTEXT; t++) {
      tokens[b * CONTEXT + t] = windows[b * (CONTEXT + 1) + t];
      targets[b * CONTEXT + t] = windows[b * (CONTEXT + 1) + t + 1];
      weights[b * CONTEXT + t] = 1.0f;
    }
}

static mxt_batch new_batch(void) {
  mxt_batch batch;
  OK(mxt_batch_init(&batch, sizeof batch));
  CHECK(batch.struct_size == sizeof batch && batch.count == 0 && batch.loss == NULL);
  batch.count = ROWS;
  batch.tokens = tokens;
  batch.targets = targets;
  return batch;
}

/* What a loss is called with. */
typedef struct {
  const uint32_t *targets;
  float smoothing;
  uint64_t rows;
  int32_t returns;
  mxt_trainer *trainer;
} host;

static int32_t smoothed(void *user_data, const mxt_logits *of) {
  host *h = user_data;
  CHECK(of->struct_size == sizeof *of && of->first_row == h->rows && of->vocab_size == VOCABULARY);
  h->rows += of->rows;
  if (h->trainer != NULL) {
    mxt_step_stats stats;
    stats.struct_size = sizeof stats;
    RETURNS(MXT_ERROR_BUSY, mxt_trainer_update(h->trainer, &stats));
    RETURNS(MXT_ERROR_BUSY, mxt_trainer_zero_gradients(h->trainer));
    CHECK(mxt_trainer_steps_done(h->trainer) == 0);
  }
  for (uint64_t row = 0; row < of->rows; row++) {
    float *y = of->logits + row * VOCABULARY;
    double most = y[0], sum = 0.0, loss = 0.0;
    for (int v = 1; v < VOCABULARY; v++) most = y[v] > most ? y[v] : most;
    for (int v = 0; v < VOCABULARY; v++) sum += exp(y[v] - most);
    for (int v = 0; v < VOCABULARY; v++) {
      const int is_target = h->targets[of->first_row + row] == (uint32_t)v;
      const double wanted = h->smoothing / VOCABULARY + (is_target ? 1.0 - h->smoothing : 0.0);
      const double log_p = y[v] - most - log(sum);
      loss -= wanted * log_p;
      y[v] = (float)(exp(log_p) - wanted);
    }
    of->losses[row] = (float)loss;
  }
  return h->returns;
}

static mxt_step_stats update(mxt_trainer *trainer) {
  mxt_step_stats stats;
  stats.struct_size = sizeof stats;
  OK(mxt_trainer_update(trainer, &stats));
  return stats;
}

int main(void) {
  mxt_engine *engine = new_engine();
  mxt_model *models[3];
  mxt_trainer *whole, *parts, *hosts;
  for (int i = 0; i < 3; i++) models[i] = new_model(engine);
  whole = new_trainer(models[0]);
  parts = new_trainer(models[1]);
  hosts = new_trainer(models[2]);

  /* The bits of a whole step, with weights and without. */
  for (uint32_t i = 0; i < 6; i++) {
    fill(i);
    mxt_step_stats expected;
    expected.struct_size = sizeof expected;
    OK(mxt_trainer_step_tokens(whole, windows, BATCH * (CONTEXT + 1), &expected));
    mxt_batch batch = new_batch();
    batch.weights = i % 2 == 0 ? NULL : weights;
    batch.losses = losses;
    OK(mxt_trainer_forward_backward(parts, &batch));
    double sum = 0.0;
    for (int row = 0; row < ROWS; row++) sum += losses[row];
    const mxt_step_stats found = update(parts);
    CHECK(found.loss == expected.loss && found.grad_norm == expected.grad_norm);
    CHECK(fabs(sum / ROWS - found.loss) < 1e-5 && found.tokens == ROWS);
  }

  /* Nothing of what is masked counts, whatever it is. */
  fill(7);
  mxt_batch batch = new_batch();
  batch.losses = losses;
  targets[3] = targets[9] = MXT_IGNORED;
  OK(mxt_trainer_forward_backward(parts, &batch));
  CHECK(losses[3] == 0.0f && losses[9] == 0.0f && losses[4] > 0.0f);
  static float bias[2][16];
  const char *name = "transformer.ln_f.bias";
  OK(mxt_trainer_read_gradient(parts, name, bias[0], 16));
  OK(mxt_trainer_zero_gradients(parts));
  FAILS(MXT_ERROR_INVALID_ARGUMENT, "were dropped",
        mxt_trainer_read_gradient(parts, name, bias[0], 16));
  FAILS(MXT_ERROR_INVALID_ARGUMENT, "call forward_backward first", mxt_trainer_update(parts, NULL));
  fill(7);
  weights[3] = weights[9] = 0.0f;
  batch.weights = weights;
  OK(mxt_trainer_forward_backward(parts, &batch));
  OK(mxt_trainer_read_gradient(parts, name, bias[1], 16));
  CHECK(memcmp(bias[0], bias[1], sizeof bias[0]) == 0 && losses[3] > 0.0f);

  /* Gradients are the host's to change. */
  OK(mxt_trainer_scale_gradients(parts, NULL, 0.5f));
  OK(mxt_trainer_read_gradient(parts, name, bias[1], 16));
  CHECK(bias[1][5] == 0.5f * bias[0][5]);
  for (int i = 0; i < 16; i++) bias[0][i] = (float)i;
  OK(mxt_trainer_write_gradient(parts, name, bias[0], 16));
  OK(mxt_trainer_scale_gradients(parts, name, 2.0f));
  OK(mxt_trainer_read_gradient(parts, name, bias[1], 16));
  CHECK(fabsf(bias[1][15] - 30.0f) < 1e-4f);
  FAILS(MXT_ERROR_INVALID_ARGUMENT, "written or scaled",
        mxt_trainer_forward_backward(parts, &batch));
  OK(mxt_trainer_zero_gradients(parts));

  /* A loss of the host's: without smoothing it is cross-entropy, with it another one. */
  fill(0);
  host h = {targets, 0.0f, 0, 0, hosts};
  batch = new_batch();
  batch.targets = NULL;
  batch.loss = smoothed;
  batch.user_data = &h;
  batch.losses = losses;
  OK(mxt_trainer_forward_backward(hosts, &batch));
  CHECK(h.rows == ROWS && losses[0] > 0.0f);
  h = (host){targets, 0.1f, 0, 3, NULL};
  FAILS(MXT_STOPPED, "the loss callback returned 3", mxt_trainer_forward_backward(hosts, &batch));
  FAILS(MXT_ERROR_INVALID_ARGUMENT, "call forward_backward first", mxt_trainer_update(hosts, NULL));
  float first = 0.0f, last = 0.0f;
  for (int i = 0; i < 40; i++) {
    h = (host){targets, 0.1f, 0, 0, NULL};
    OK(mxt_trainer_forward_backward(hosts, &batch));
    last = update(hosts).loss;
    if (i == 0) first = last;
  }
  CHECK(last < first - 0.5f && mxt_trainer_steps_done(hosts) == 40);

  /* The loss alone, of the library and of the host, with batches that wait beside. */
  fill(0);
  batch = new_batch();
  OK(mxt_trainer_forward_backward(hosts, &batch));
  OK(mxt_trainer_read_gradient(hosts, name, bias[0], 16));
  mxt_eval_stats eval[2];
  eval[0].struct_size = eval[1].struct_size = sizeof eval[0];
  targets[5] = MXT_IGNORED;
  batch.losses = losses;
  OK(mxt_trainer_forward(hosts, &batch, &eval[0]));
  CHECK(eval[0].tokens == ROWS - 1 && losses[5] == 0.0f && losses[6] > 0.0f);
  h = (host){targets, 0.0f, 0, 0, NULL};
  batch.loss = smoothed;
  batch.user_data = &h;
  OK(mxt_trainer_forward(hosts, &batch, &eval[1]));
  CHECK(h.rows == ROWS && fabsf(eval[0].loss - eval[1].loss) < 1e-5f);
  h = (host){targets, 0.0f, 0, 9, NULL};
  FAILS(MXT_STOPPED, "returned 9", mxt_trainer_forward(hosts, &batch, &eval[1]));
  OK(mxt_trainer_read_gradient(hosts, name, bias[1], 16));
  CHECK(memcmp(bias[0], bias[1], sizeof bias[0]) == 0);
  CHECK(update(hosts).step == 41);

  /* Refusals leave what waits. */
  batch = new_batch();
  OK(mxt_trainer_forward_backward(parts, &batch));
  mxt_dataset *dataset = new_dataset();
  FAILS(MXT_ERROR_INVALID_ARGUMENT, "1 batches wait", mxt_trainer_step(parts, dataset, NULL));
  batch.count = ROWS - 1;
  FAILS(MXT_ERROR_INVALID_ARGUMENT, "count", mxt_trainer_forward_backward(parts, &batch));
  batch.count = SIZE_MAX;
  FAILS(MXT_ERROR_INVALID_ARGUMENT, "", mxt_trainer_forward_backward(parts, &batch));
  batch = new_batch();
  tokens[2] = VOCABULARY;
  FAILS(MXT_ERROR_TOKEN_RANGE, "the tokens of this batch",
        mxt_trainer_forward_backward(parts, &batch));
  tokens[2] = 0;
  targets[2] = VOCABULARY;
  FAILS(MXT_ERROR_TOKEN_RANGE, "the targets of this batch",
        mxt_trainer_forward_backward(parts, &batch));
  targets[2] = 0;
  weights[4] = INFINITY;
  batch.weights = weights;
  FAILS(MXT_ERROR_NOT_FINITE, "weight 4", mxt_trainer_forward_backward(parts, &batch));
  batch.weights = NULL;
  batch.divisor = NAN;
  FAILS(MXT_ERROR_INVALID_ARGUMENT, "finite", mxt_trainer_forward_backward(parts, &batch));
  batch.struct_size = 12;
  RETURNS(MXT_ERROR_STRUCT_SIZE, mxt_trainer_forward_backward(parts, &batch));
  FAILS(MXT_ERROR_NO_SUCH_TENSOR, "nothing",
        mxt_trainer_read_gradient(parts, "nothing", bias[0], 16));
  FAILS(MXT_ERROR_INVALID_ARGUMENT, "16", mxt_trainer_write_gradient(parts, name, bias[0], 15));
  CHECK(update(parts).tokens == ROWS);

  /* A mean over nothing is none. */
  fill(3);
  for (int row = 0; row < ROWS; row++) targets[row] = MXT_IGNORED;
  batch = new_batch();
  OK(mxt_trainer_forward_backward(parts, &batch));
  FAILS(MXT_ERROR_INVALID_ARGUMENT, "every target is ignored", mxt_trainer_update(parts, NULL));
  batch.divisor = ROWS;
  OK(mxt_trainer_forward_backward(parts, &batch));
  CHECK(update(parts).loss == 0.0f);

  mxt_dataset_free(dataset);
  mxt_trainer_free(whole);
  mxt_trainer_free(parts);
  mxt_trainer_free(hosts);
  for (int i = 0; i < 3; i++) mxt_model_free(models[i]);
  mxt_engine_free(engine);
  return 0;
}
