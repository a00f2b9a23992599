/* Documents that share a sequence, as a host tells them apart and as a token does; and hosts that
   do it wrong. */
#include "check.h"

#include <math.h>

enum { ROWS = BATCH * CONTEXT, END = 30 };

static uint32_t tokens[ROWS], targets[ROWS], documents[ROWS];
static float together[ROWS], alone[ROWS];

static mxt_batch new_batch(void) {
  mxt_batch batch;
  OK(mxt_batch_init(&batch, sizeof batch));
  CHECK(batch.documents == NULL);
  batch.count = ROWS;
  batch.tokens = tokens;
  batch.targets = targets;
  return batch;
}

static float loss_of(mxt_trainer *trainer, const mxt_batch *batch) {
  mxt_eval_stats stats;
  stats.struct_size = sizeof stats;
  OK(mxt_trainer_forward(trainer, batch, &stats));
  return stats.loss;
}

static int32_t fill(void *user_data, uint64_t number, uint32_t *to, float *weights, uint32_t *of,
                    size_t length) {
  (void)weights;
  CHECK(length == CONTEXT && number < 6 && of[0] == 0 && of[length - 1] == 0);
  for (size_t i = 0; i <= length; i++) to[i] = i % 5 == 3 ? END : (uint32_t)((i * i + number) % 29);
  /* Any numbers do, the largest among them. */
  if (user_data != NULL)
    for (size_t i = 0; i < length; i++) of[i] = (i + 1) / 5 % 2 == 0 ? UINT32_MAX : (uint32_t)i / 9;
  return *(int *)(user_data != NULL ? user_data : &(int){0});
}

int main(void) {
  mxt_engine *engine = new_engine();
  mxt_model *model = new_model(engine);
  mxt_trainer *trainer = new_trainer(model);
  mxt_trainer_options options = small_options();
  CHECK(options.has_document_end == 0 && options.document_end == 0);
  mxt_trainer *other = NULL;

  /* Documents of 4, 1 and 11 tokens, and of 16: the loss of each token is what it is alone. */
  const size_t firsts[] = {0, 4, 5, 16, 32};
  for (size_t of = 0; of < 4; of++)
    for (size_t i = firsts[of]; i < firsts[of + 1]; i++) {
      tokens[i] = i + 1 == firsts[of + 1] ? END : (uint32_t)((i * i + 3 * of) % 29);
      targets[i] =
          i + 1 == firsts[of + 1] ? MXT_IGNORED : (uint32_t)(((i + 1) * (i + 1) + 3 * of) % 29);
      if (i + 2 == firsts[of + 1]) targets[i] = END;
      documents[i] = of == 0 ? UINT32_MAX : (uint32_t)of;
    }
  mxt_batch batch = new_batch();
  batch.losses = together;
  batch.documents = documents;
  const float packed = loss_of(trainer, &batch);
  for (size_t of = 0; of < 4; of++) {
    const size_t length = firsts[of + 1] - firsts[of];
    options = small_options();
    options.batch_size = 1;
    options.sequence_length = length;
    OK(mxt_trainer_new(model, &options, &other));
    mxt_batch one = new_batch();
    one.tokens = tokens + firsts[of];
    one.targets = targets + firsts[of];
    one.count = length;
    one.losses = alone;
    one.divisor = 1.0;
    (void)loss_of(other, &one);
    CHECK(memcmp(alone, together + firsts[of], length * sizeof *alone) == 0);
    mxt_trainer_free(other);
  }
  batch.documents = NULL;
  CHECK(loss_of(trainer, &batch) != packed);

  /* A token that ends them says the same, and numbers win over it. */
  options = small_options();
  options.has_document_end = 1;
  options.document_end = END;
  mxt_trainer *by_token = NULL;
  OK(mxt_trainer_new(model, &options, &by_token));
  CHECK(loss_of(by_token, &batch) == packed);
  batch.documents = documents;
  CHECK(loss_of(by_token, &batch) == packed);
  for (size_t i = 0; i < ROWS; i++) documents[i] = 5;
  CHECK(loss_of(by_token, &batch) == loss_of(trainer, &batch) &&
        loss_of(trainer, &batch) != packed);
  for (size_t of = 0; of < 4; of++)
    for (size_t i = firsts[of]; i < firsts[of + 1]; i++) documents[i] = (uint32_t)of % 2;
  mxt_trainer_options kept;
  kept.struct_size = sizeof kept;
  OK(mxt_trainer_get_options(by_token, &kept));
  CHECK(kept.has_document_end == 1 && kept.document_end == END);
  OK(mxt_trainer_get_options(trainer, &kept));
  CHECK(kept.has_document_end == 0 && kept.document_end == 0);

  /* Gradients and a step of them. */
  OK(mxt_trainer_forward_backward(trainer, &batch));
  mxt_step_stats stats;
  stats.struct_size = sizeof stats;
  OK(mxt_trainer_update(trainer, &stats));
  CHECK(fabsf(stats.loss - packed) < 1e-5f);

  /* Windows of the host: numbers, or the token. */
  int code = 0;
  mxt_dataset *datasets[2] = {NULL, NULL};
  OK(mxt_dataset_from_packed_windows(6, fill, &code, NULL, &datasets[0]));
  OK(mxt_dataset_from_packed_windows(6, fill, NULL, NULL, &datasets[1]));
  mxt_eval_stats evals[3];
  for (int i = 0; i < 3; i++) evals[i].struct_size = sizeof evals[i];
  OK(mxt_trainer_eval(trainer, datasets[0], 0, &evals[0]));
  OK(mxt_trainer_eval(by_token, datasets[1], 0, &evals[1]));
  OK(mxt_trainer_eval(trainer, datasets[1], 0, &evals[2]));
  CHECK(evals[0].tokens == 6 * CONTEXT && evals[0].loss == evals[1].loss);
  CHECK(evals[0].loss != evals[2].loss);
  CHECK(step(trainer, datasets[0]).loss > 0.0f && step(by_token, datasets[1]).loss > 0.0f);
  code = 4;
  FAILS(MXT_ERROR_IO, "the callback returned 4", mxt_trainer_step(trainer, datasets[0], NULL));
  mxt_dataset *none = NULL;
  FAILS(MXT_ERROR_INVALID_ARGUMENT, "at least 1",
        mxt_dataset_from_packed_windows(0, fill, NULL, NULL, &none));

  /* A host of before, whose structs have none of it. */
  mxt_batch before = batch;
  before.struct_size = offsetof(mxt_batch, documents);
  const float whole = loss_of(trainer, &before);
  batch.documents = NULL;
  CHECK(loss_of(trainer, &batch) == whole);
  batch.documents = documents;

  /* What goes wrong. */
  batch.count = ROWS - 1;
  FAILS(MXT_ERROR_INVALID_ARGUMENT, "count", mxt_trainer_forward_backward(trainer, &batch));
  batch.count = SIZE_MAX;
  batch.losses = NULL;
  FAILS(MXT_ERROR_INVALID_ARGUMENT, "in memory", mxt_trainer_forward_backward(trainer, &batch));
  options = small_options();
  options.document_end = END;
  FAILS(MXT_ERROR_INVALID_ARGUMENT, "has_document_end", mxt_trainer_new(model, &options, &other));
  options.has_document_end = 2;
  FAILS(MXT_ERROR_INVALID_ARGUMENT, "expected 0 or 1, got 2",
        mxt_trainer_new(model, &options, &other));
  options.has_document_end = 1;
  options.document_end = UINT32_MAX;
  FAILS(MXT_ERROR_INVALID_ARGUMENT, "document_end", mxt_trainer_new(model, &options, &other));

  for (int i = 0; i < 2; i++) mxt_dataset_free(datasets[i]);
  mxt_trainer_free(by_token);
  mxt_trainer_free(trainer);
  mxt_model_free(model);
  mxt_engine_free(engine);
  return 0;
}
