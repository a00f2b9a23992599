/* Every allocation of every call fails in turn, once or from there on, and so does every mapping.
 * No process ends by it: a call succeeds or says what is wrong, and works once memory is back. */
#define _GNU_SOURCE
#include "check.h"

#include <errno.h>
#include <signal.h>
#include <stdatomic.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

/* Every STRIDE-th failure is tried, and all of the first 12. */
#ifndef STRIDE
#define STRIDE 1
#endif

extern void *__libc_malloc(size_t), *__libc_calloc(size_t, size_t), *__libc_realloc(void *, size_t);
extern void *__libc_memalign(size_t, size_t);

enum kind { ALLOCATION_ONCE, ALLOCATIONS_FROM, MAPPING_ONCE, LARGE_ONCE, KINDS };
static const char *const KIND[KINDS] = {"a failed allocation", "failed allocations",
                                        "a failed mapping", "a failed large allocation"};

/* Larger than any piece of the library's reserve, with a model whose names fill such pieces. */
enum { LARGE = (64 << 10) + 1, MANY_LAYERS = 64 };

static atomic_int armed, failed;
static atomic_long count;
static enum kind kind;
static long index_of_failure;

static int fails(int mapping, size_t size) {
  if (!armed || mapping != (kind == MAPPING_ONCE) || (kind == LARGE_ONCE && size < LARGE)) return 0;
  const long now = atomic_fetch_add(&count, 1);
  if (now != index_of_failure && !(kind == ALLOCATIONS_FROM && now > index_of_failure)) return 0;
  failed = 1;
  errno = ENOMEM;
  return 1;
}

/* In place of libc's, for the library as well. */
void *malloc(size_t size) { return fails(0, size) ? NULL : __libc_malloc(size); }
void *calloc(size_t n, size_t size) { return fails(0, n * size) ? NULL : __libc_calloc(n, size); }
void *realloc(void *block, size_t size) {
  return fails(0, size) ? NULL : __libc_realloc(block, size);
}
int posix_memalign(void **out, size_t align, size_t size) {
  if (fails(0, size)) return ENOMEM;
  *out = __libc_memalign(align, size);
  return *out == NULL ? ENOMEM : 0;
}
void *mmap(void *address, size_t size, int protection, int flags, int file, off_t offset) {
  if (fails(1, size)) return MAP_FAILED;
  return (void *)syscall(SYS_mmap, address, size, protection, flags, file, offset);
}
void *mmap64(void *address, size_t size, int protection, int flags, int file, off_t offset) {
  return mmap(address, size, protection, flags, file, offset);
}
int madvise(void *address, size_t size, int advice) {
  return fails(1, size) ? -1 : (int)syscall(SYS_madvise, address, size, advice);
}

/* clang-format off */
enum call {
  ENGINE_NEW, MODEL_NEW, TRAINER_NEW, STEP, EVAL, SAVE, SAVE_AGAIN, TRAINER_LOAD, MODEL_LOAD,
  SAVE_TO, MODEL_SAVE_TO, TRAINER_LOAD_FROM, MODEL_LOAD_FROM, FILES_PUT, GENERATE, NEXT_LOGITS,
  TENSOR_READ, TENSOR_WRITE, TENSOR_UNKNOWN, DATASET_TOKENS, DATASET_OPEN, DATASET_GLOB, PLAN,
  GET_OPTIONS, TRAINER_MODEL, RUN, SET_LR, WATCH_UPDATES, WATCH_WEIGHTS, FREES, BUILD_INFO, CALLS
};
static const char *const CALL[CALLS] = {
  "engine_new", "model_new", "trainer_new", "step", "eval", "save", "save again", "trainer_load",
  "model_load", "trainer_save_to", "model_save_to", "trainer_load_from", "model_load_from",
  "files_put", "generate", "next_logits", "tensor_read", "tensor_write", "tensor_read of none",
  "dataset_from_tokens", "dataset_open", "dataset_open of a pattern", "plan", "get_options",
  "trainer_model", "run", "set_lr", "watch_updates", "watch_weights", "frees", "build_info"
};
/* clang-format on */

static mxt_engine *engine, *new_engine_;
static mxt_model *model, *new_model_;
static mxt_trainer *trainer, *new_trainer_;
static mxt_dataset *dataset, *new_dataset_;
static mxt_files *files;
static char checkpoint[4096], tokens_file[4096], pattern[4096];
static uint32_t tokens[DATA];

/* How many failures of a kind may end the process where all of them are tried. These numbers only
 * fall. An engine: glibc's own memory for the end of a thread, for each of the two. */
static const int ENDS_ALLOWED[KINDS][CALLS] = {[ALLOCATION_ONCE] = {[ENGINE_NEW] = 2},
                                               [ALLOCATIONS_FROM] = {[ENGINE_NEW] = 4}};

#define WEIGHT "transformer.h.0.attn.c_attn.weight"

/* What `call` needs, made before memory fails. Nothing of another process is of use once forked. */
static void prepare(enum call call) {
  engine = new_engine();
  if (call == ENGINE_NEW || call == BUILD_INFO) return;
  mxt_model_config config = small_config();
  if (kind == LARGE_ONCE) config.layers = MANY_LAYERS;
  OK(mxt_model_new(engine, &config, &model));
  dataset = new_dataset();
  mxt_trainer_options options = small_options();
  if (call == WATCH_WEIGHTS) options.recipe = "tetrajet";
  OK(mxt_trainer_new(model, &options, &trainer));
  step(trainer, dataset);
  if (call == SAVE_AGAIN || call == TRAINER_LOAD || call == MODEL_LOAD)
    OK(mxt_trainer_save(trainer, checkpoint));
  OK(mxt_files_in_memory(&files));
  if (call == TRAINER_LOAD_FROM || call == MODEL_LOAD_FROM) OK(mxt_trainer_save_to(trainer, files));
}

static mxt_status run(enum call call) {
  const uint32_t prompt[3] = {1, 2, 3};
  const mxt_model_config config = small_config();
  mxt_trainer_options options = small_options();
  mxt_engine_options engine_options;
  mxt_generate_options generate;
  mxt_run_options run_options;
  mxt_eval_stats eval;
  mxt_memory_plan plan;
  uint32_t text[8];
  size_t written;
  static float values[16 * 48];
  mxt_status status;

  switch (call) {
    case ENGINE_NEW:
      OK(mxt_engine_options_init(&engine_options, sizeof engine_options));
      engine_options.threads = 2;
      return mxt_engine_new(&engine_options, &new_engine_);
    case MODEL_NEW: return mxt_model_new(engine, &config, &new_model_);
    case TRAINER_NEW: return mxt_trainer_new(model, &options, &new_trainer_);
    case STEP: return mxt_trainer_step(trainer, dataset, NULL);
    case EVAL: eval.struct_size = sizeof eval; return mxt_trainer_eval(trainer, dataset, 2, &eval);
    case SAVE:
    case SAVE_AGAIN: return mxt_trainer_save(trainer, checkpoint);
    case TRAINER_LOAD: return mxt_trainer_load(engine, checkpoint, &new_trainer_);
    case MODEL_LOAD: return mxt_model_load(engine, checkpoint, &new_model_);
    case SAVE_TO: return mxt_trainer_save_to(trainer, files);
    case MODEL_SAVE_TO: return mxt_model_save_to(model, files, MXT_STORED_WEIGHTS_MXFP4);
    case TRAINER_LOAD_FROM: return mxt_trainer_load_from(engine, files, NULL, &new_trainer_);
    case MODEL_LOAD_FROM: return mxt_model_load_from(engine, files, &new_model_);
    case FILES_PUT: return mxt_files_put(files, "tokens", tokens, sizeof tokens);
    case GENERATE:
      OK(mxt_generate_options_init(&generate, sizeof generate));
      generate.max_tokens = 8;
      return mxt_model_generate(model, &generate, prompt, 3, text, 8, &written);
    case NEXT_LOGITS: return mxt_model_next_logits(model, prompt, 3, values, VOCABULARY);
    case TENSOR_READ: return mxt_model_tensor_read(model, WEIGHT, values, 16 * 48);
    case TENSOR_WRITE: return mxt_model_tensor_write(model, WEIGHT, values, 16 * 48);
    case TENSOR_UNKNOWN:
      status = mxt_model_tensor_read(model, "none", values, 16 * 48);
      return status == MXT_ERROR_NO_SUCH_TENSOR ? MXT_OK : status;
    case DATASET_TOKENS: return mxt_dataset_from_tokens(tokens, DATA, &new_dataset_);
    case DATASET_OPEN: return mxt_dataset_open(tokens_file, &new_dataset_);
    case DATASET_GLOB: return mxt_dataset_open(pattern, &new_dataset_);
    case PLAN: plan.struct_size = sizeof plan; return mxt_plan(engine, &config, &options, &plan);
    case GET_OPTIONS:
      options.struct_size = sizeof options;
      return mxt_trainer_get_options(trainer, &options);
    case TRAINER_MODEL: return mxt_trainer_model(trainer, &new_model_);
    case RUN:
      OK(mxt_run_options_init(&run_options, sizeof run_options));
      run_options.steps = 2;
      run_options.eval_dataset = dataset;
      run_options.save_dir = checkpoint;
      return mxt_trainer_run(trainer, dataset, &run_options, NULL);
    case SET_LR:
      status = mxt_trainer_set_lr(trainer, -1);
      return status == MXT_ERROR_INVALID_ARGUMENT ? MXT_OK : status;
    case WATCH_UPDATES:
      status = mxt_trainer_watch_updates(trainer, 1);
      return status == MXT_OK ? mxt_trainer_step(trainer, dataset, NULL) : status;
    case WATCH_WEIGHTS:
      status = mxt_trainer_watch_weights(trainer, 1);
      return status == MXT_OK ? mxt_trainer_step(trainer, dataset, NULL) : status;
    case BUILD_INFO: return mxt_build_info()[0] == '{' ? MXT_OK : MXT_ERROR_PANIC;
    default: return MXT_OK;
  }
}

static void free_what_is_new(void) {
  mxt_engine_free(new_engine_);
  mxt_model_free(new_model_);
  mxt_trainer_free(new_trainer_);
  mxt_dataset_free(new_dataset_);
  new_engine_ = NULL;
  new_model_ = NULL;
  new_trainer_ = NULL;
  new_dataset_ = NULL;
}

/* In a child: whether failure number `index_of_failure` came, or the call is over before. */
static int try_one(enum call call) {
  prepare(call);
  armed = 1;
  const mxt_status status = run(call);
  mxt_last_error();
  free_what_is_new();
  if (call == FREES) {
    mxt_engine_free(engine);
    mxt_model_free(model);
    mxt_trainer_free(trainer);
    mxt_dataset_free(dataset);
  }
  armed = 0;
  if (status != MXT_OK) {
    CHECK(failed && mxt_last_error()[0] != 0);
    CHECK(status == MXT_ERROR_OUT_OF_MEMORY || status == MXT_ERROR_IO ||
          status == MXT_ERROR_UNSUPPORTED);
  }
  if (call != FREES) OK(run(call));
  return failed;
}

int main(int argc, char **argv) {
  CHECK(argc == 2);
  snprintf(checkpoint, sizeof checkpoint, "%s/checkpoint", argv[1]);
  snprintf(tokens_file, sizeof tokens_file, "%s/tokens.bin", argv[1]);
  snprintf(pattern, sizeof pattern, "%s/tok*.bin", argv[1]);
  FILE *file = fopen(tokens_file, "wb");
  CHECK(file != NULL);
  for (int i = 0; i < DATA; i++) {
    const uint16_t token = (uint16_t)(i % 29);
    CHECK(fwrite(&token, sizeof token, 1, file) == 1);
  }
  CHECK(fclose(file) == 0);

  const int is_loud = getenv("MXT_TEST_LOUD") != NULL;
  int ends = 0, tried = 0, too_many = 0;
  for (int k = 0; k < KINDS; k++) {
    for (int call = 0; call < CALLS; call++) {
      int ends_here = 0, over = 0;
      if (k == LARGE_ONCE && (call < SAVE || call > FILES_PUT)) continue;
      for (long i = 0; !over; i += i < 12 || k == LARGE_ONCE ? 1 : STRIDE) {
        kind = (enum kind)k;
        index_of_failure = i;
        const pid_t child = fork();
        CHECK(child >= 0);
        if (child == 0) {
          /* What the standard library says before it ends the process. */
          CHECK(is_loud || freopen("/dev/null", "w", stderr) != NULL);
          alarm(60);
          _exit(try_one((enum call)call) ? 10 : 11);
        }
        int status = 0;
        CHECK(waitpid(child, &status, 0) == child);
        over = WIFEXITED(status) && WEXITSTATUS(status) == 11;
        tried++;
        if (WIFSIGNALED(status) && WTERMSIG(status) == SIGABRT) {
          ends_here++;
        } else if (!WIFEXITED(status) || WEXITSTATUS(status) < 10) {
          fprintf(stderr, "%s with %s %ld: status %#x\n", CALL[call], KIND[k], i, (unsigned)status);
          return 1;
        }
      }
      ends += ends_here;
      too_many |= ends_here > ENDS_ALLOWED[k][call];
      if (ends_here > ENDS_ALLOWED[k][call] || (is_loud && ends_here > 0))
        fprintf(stderr, "%s: %d times %s ended the process\n", CALL[call], ends_here, KIND[k]);
    }
  }
  if (is_loud) printf("%d of %d failures ended the process\n", ends, tried);
  return too_many;
}
