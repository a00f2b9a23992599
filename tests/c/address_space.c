/* A life of a trainer with less and less address space: every call succeeds or is an error. */
#define _GNU_SOURCE
#include "check.h"

#include <signal.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

/* Limits tried: so many KiB more than in use, each a step further. */
#ifndef STEP
#define STEP 640
#endif
enum { MOST = 600 * 64 };

static void limit_to(long kib) {
  unsigned long long pages = 0;
  struct rlimit limit;
  FILE *file = fopen("/proc/self/statm", "r");
  CHECK(file != NULL && fscanf(file, "%llu", &pages) == 1 && fclose(file) == 0);
  CHECK(getrlimit(RLIMIT_AS, &limit) == 0);
  limit.rlim_cur = (rlim_t)pages * 4096 + (rlim_t)kib * 1024;
  CHECK(setrlimit(RLIMIT_AS, &limit) == 0);
}

static mxt_status live(void) {
  static uint32_t tokens[DATA];
  const mxt_model_config config = small_config();
  const mxt_trainer_options options = small_options();
  mxt_engine_options engine_options;
  mxt_generate_options generate;
  mxt_engine *engine = NULL;
  mxt_model *model = NULL;
  mxt_trainer *trainer = NULL;
  mxt_dataset *dataset = NULL;
  size_t written;

  OK(mxt_engine_options_init(&engine_options, sizeof engine_options));
  engine_options.threads = 4;
  OK(mxt_generate_options_init(&generate, sizeof generate));
  generate.max_tokens = 4;
  mxt_status status = mxt_engine_new(&engine_options, &engine);
  if (status == MXT_OK) status = mxt_model_new(engine, &config, &model);
  if (status == MXT_OK) status = mxt_trainer_new(model, &options, &trainer);
  if (status == MXT_OK) status = mxt_dataset_from_tokens(tokens, DATA, &dataset);
  if (status == MXT_OK) status = mxt_trainer_step(trainer, dataset, NULL);
  if (status == MXT_OK) status = mxt_model_generate(model, &generate, tokens, 1, NULL, 0, &written);
  mxt_engine_free(engine);
  mxt_model_free(model);
  mxt_trainer_free(trainer);
  mxt_dataset_free(dataset);
  return status;
}

int main(void) {
  int fine = 0, refused = 0;
  for (long kib = 0; kib < MOST; kib += STEP) {
    const pid_t child = fork();
    CHECK(child >= 0);
    if (child == 0) {
      alarm(60);
      mxt_last_error();
      limit_to(kib);
      const mxt_status status = live();
      const int refused = status == MXT_ERROR_OUT_OF_MEMORY || status == MXT_ERROR_UNSUPPORTED;
      _exit(status == MXT_OK ? 0 : refused ? 2 : 3);
    }
    int status = 0;
    CHECK(waitpid(child, &status, 0) == child);
    if (!WIFEXITED(status) || WEXITSTATUS(status) > 2 || WEXITSTATUS(status) == 1) {
      fprintf(stderr, "with %ld KiB: status %#x\n", kib, (unsigned)status);
      return 1;
    }
    *(WEXITSTATUS(status) == 0 ? &fine : &refused) += 1;
  }
  CHECK(fine > 0 && refused > 0);
  return 0;
}
