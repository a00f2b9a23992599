/* A guest leaves the host's process as it found it: floating-point mode, locale, signal mask,
 * folder. And what the host has set changes no result. */
#define _GNU_SOURCE
#include "check.h"

#include <dirent.h>
#include <locale.h>
#include <pthread.h>
#include <signal.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <unistd.h>

/* The floating-point mode: what decides about rounding, denormals and traps. */
#if defined(__x86_64__)
static uint32_t get_mode(void) {
  uint32_t mode;
  __asm__ volatile("stmxcsr %0" : "=m"(mode));
  return mode;
}
static void set_mode(uint32_t mode) { __asm__ volatile("ldmxcsr %0" : : "m"(mode)); }
enum {
  PLAIN = 0x1f80,
  ROUND_UP = PLAIN | 2 << 13,
  FLUSH = PLAIN | 1 << 15 | 1 << 6, /* flush to zero, denormals are zero */
  FLAGS = PLAIN | 0x21,             /* the flags "invalid" and "inexact" are raised */
  TRAPS = 0                         /* no exception is masked */
};
static const uint32_t modes[] = {PLAIN, ROUND_UP, FLUSH, ROUND_UP | FLUSH, FLAGS, TRAPS};
#elif defined(__aarch64__)
static uint32_t get_mode(void) {
  uint64_t mode;
  __asm__ volatile("mrs %0, fpcr" : "=r"(mode));
  return (uint32_t)mode;
}
static void set_mode(uint32_t mode) {
  const uint64_t wide = mode;
  __asm__ volatile("msr fpcr, %0" : : "r"(wide));
}
static const uint32_t modes[] = {0, 1 << 22 /* round up */, 1 << 24 /* flush to zero */};
#else
static uint32_t get_mode(void) { return 0; }
static void set_mode(uint32_t mode) { (void)mode; }
static const uint32_t modes[] = {0};
#endif

static uint32_t mode; /* the host's */
static int calls;     /* of callbacks */

static void seen_in_callback(void) {
  CHECK(get_mode() == mode);
  calls++;
}

static void on_log(void *user_data, int32_t level, const char *line) {
  (void)user_data, (void)level, (void)line;
  seen_in_callback();
}

static int32_t on_token(void *user_data, uint32_t token) {
  (void)user_data, (void)token;
  seen_in_callback();
  return 0;
}

static int32_t on_step(void *user_data, const mxt_step_stats *step_, const mxt_eval_stats *eval) {
  (void)user_data, (void)step_, (void)eval;
  seen_in_callback();
  return 0;
}

struct outcome {
  float losses[5], eval, weights[16];
  uint32_t tokens[8];
};

/* Trains, saves, resumes and generates in the mode `host_mode`. */
static struct outcome train(uint32_t host_mode, const char *folder) {
  struct outcome outcome;
  mxt_engine_options options;
  mxt_engine *engine = NULL;
  mxt_dataset *dataset = new_dataset();
  mxt_model_config config = small_config();
  mxt_model *model = NULL;
  mxt_trainer *trainer = NULL, *resumed = NULL;
  mxt_trainer_options trainer_options = small_options();
  mxt_generate_options generate;
  mxt_run_options run;
  mxt_eval_stats eval;
  mxt_step_stats stats;
  const uint32_t prompt = 3;
  size_t written = 0;

  memset(&outcome, 0, sizeof outcome);
  OK(mxt_engine_options_init(&options, sizeof options));
  options.threads = 3;
  options.log = on_log;
  OK(mxt_generate_options_init(&generate, sizeof generate));
  generate.max_tokens = 8;
  generate.on_token = on_token;
  OK(mxt_run_options_init(&run, sizeof run));
  run.steps = 2;
  run.on_step = on_step;
  run.save_dir = folder;
  eval.struct_size = sizeof eval;
  stats.struct_size = sizeof stats;

  set_mode(host_mode);
  mode = get_mode(); /* valgrind does not know all modes: what it makes of this one */
#define KEEPS(call) \
  do { \
    const mxt_status kept_ = (call); \
    const uint32_t after = get_mode(); \
    set_mode(modes[0]); \
    RETURNS(MXT_OK, kept_); \
    CHECK(after == mode); \
    set_mode(host_mode); \
  } while (0)
  KEEPS(mxt_engine_new(&options, &engine));
  KEEPS(mxt_model_new(engine, &config, &model));
  KEEPS(mxt_trainer_new(model, &trainer_options, &trainer));
  for (int i = 0; i < 2; i++) {
    KEEPS(mxt_trainer_step(trainer, dataset, &stats));
    outcome.losses[i] = stats.loss;
  }
  KEEPS(mxt_trainer_run(trainer, dataset, &run, NULL));
  KEEPS(mxt_trainer_load(engine, folder, &resumed));
  KEEPS(mxt_trainer_step(resumed, dataset, &stats));
  outcome.losses[2] = stats.loss;
  KEEPS(mxt_trainer_step(trainer, dataset, &stats));
  outcome.losses[3] = stats.loss;
  KEEPS(mxt_trainer_eval(trainer, dataset, 2, &eval));
  outcome.eval = eval.loss;
  KEEPS(mxt_model_generate(model, &generate, &prompt, 1, outcome.tokens, 8, &written));
  KEEPS(mxt_model_tensor_read(model, "transformer.ln_f.bias", outcome.weights, 16));
  /* Failing calls, too. */
  CHECK(mxt_trainer_set_lr(trainer, -1) == MXT_ERROR_INVALID_ARGUMENT && get_mode() == mode);
  mxt_trainer_free(resumed);
  mxt_trainer_free(trainer);
  mxt_model_free(model);
  mxt_engine_free(engine);
  CHECK(get_mode() == mode);
  set_mode(modes[0]);
  mxt_dataset_free(dataset);
  CHECK(outcome.losses[2] == outcome.losses[3]);
  return outcome;
}

static void floating_point(const char *folder) {
  const struct outcome plain = train(modes[0], folder);
  CHECK(calls >= 11); /* a line of the engine, two steps, eight tokens */
  for (size_t i = 1; i < sizeof modes / sizeof *modes; i++) {
    const struct outcome other = train(modes[i], folder);
    CHECK(memcmp(&plain, &other, sizeof plain) == 0);
  }
}

static pthread_t handled_by;
static volatile sig_atomic_t handled;

static void on_signal(int number) {
  (void)number;
  handled_by = pthread_self();
  handled = 1;
}

/* The only thread of the host that takes SIGUSR1. */
static void *take_signals(void *argument) {
  sigset_t usr1;
  (void)argument;
  sigemptyset(&usr1);
  sigaddset(&usr1, SIGUSR1);
  CHECK(pthread_sigmask(SIG_UNBLOCK, &usr1, NULL) == 0);
  while (!handled) sched_yield();
  CHECK(pthread_equal(handled_by, pthread_self()));
  return NULL;
}

#if defined(__linux__)
/* Workers block what a host may handle, and nothing that tells of their own faults. */
static int check_workers(void) {
  int workers = 0;
  DIR *tasks = opendir("/proc/self/task");
  struct dirent *task;
  CHECK(tasks != NULL);
  while ((task = readdir(tasks)) != NULL) {
    char path[300], line[256], name[64] = "";
    unsigned long long blocked = 0;
    snprintf(path, sizeof path, "/proc/self/task/%s/status", task->d_name);
    FILE *file = fopen(path, "r");
    if (file == NULL) continue;
    while (fgets(line, sizeof line, file) != NULL) {
      sscanf(line, "Name: %63s", name);
      sscanf(line, "SigBlk: %llx", &blocked);
    }
    fclose(file);
    if (strncmp(name, "mxt-", 4) != 0) continue;
    workers++;
#define IS_BLOCKED(number) (blocked >> ((number) - 1) & 1)
    CHECK(IS_BLOCKED(SIGINT) && IS_BLOCKED(SIGTERM) && IS_BLOCKED(SIGUSR1) && IS_BLOCKED(SIGALRM));
    CHECK(!IS_BLOCKED(SIGSEGV) && !IS_BLOCKED(SIGBUS) && !IS_BLOCKED(SIGFPE));
  }
  closedir(tasks);
  return workers;
}

/* Waits for that number: a thread gets its name, and leaves /proc, when the system comes to it. */
static void expect_workers(int number) {
  while (check_workers() != number) sched_yield();
}
#endif

static void signals(int know_proc) {
  sigset_t mask, before, after;
  struct sigaction action;
  pthread_t host;
  mxt_engine_options options;
  mxt_engine *engine = NULL;

  memset(&action, 0, sizeof action);
  action.sa_handler = on_signal;
  CHECK(sigaction(SIGUSR1, &action, NULL) == 0);
  sigemptyset(&mask);
  sigaddset(&mask, SIGUSR2);
  CHECK(pthread_sigmask(SIG_SETMASK, &mask, NULL) == 0);
  CHECK(pthread_sigmask(SIG_SETMASK, NULL, &before) == 0);

  OK(mxt_engine_options_init(&options, sizeof options));
  options.threads = 4;
  OK(mxt_engine_new(&options, &engine));
  mxt_model *model = new_model(engine);
  mxt_trainer *trainer = new_trainer(model);
  mxt_dataset *dataset = new_dataset();
  step(trainer, dataset);
  CHECK(pthread_sigmask(SIG_SETMASK, NULL, &after) == 0);
  for (int number = 1; number < 32; number++) {
    CHECK(sigismember(&before, number) == sigismember(&after, number));
  }
#if defined(__linux__)
  if (know_proc) expect_workers(4);
#else
  (void)know_proc;
#endif

  /* A signal to the process finds the thread that the host has meant for it. */
  sigaddset(&mask, SIGUSR1);
  CHECK(pthread_sigmask(SIG_SETMASK, &mask, NULL) == 0);
  CHECK(pthread_create(&host, NULL, take_signals, NULL) == 0);
  CHECK(kill(getpid(), SIGUSR1) == 0);
  CHECK(pthread_join(host, NULL) == 0);

  mxt_dataset_free(dataset);
  mxt_trainer_free(trainer);
  mxt_model_free(model);
  mxt_engine_free(engine);
#if defined(__linux__)
  if (know_proc) expect_workers(0);
#endif
}

/* A file that may not grow is an error of the call, no signal, and what was saved before stays. */
static void file_limit(const char *dir) {
  mxt_engine *engine = new_engine();
  mxt_model *model = NULL;
  const mxt_model_config config = small_config();
  struct rlimit limit, small;
  sigset_t pending;
  OK(mxt_model_new(engine, &config, &model));
  OK(mxt_model_save(model, dir));
  CHECK(getrlimit(RLIMIT_FSIZE, &limit) == 0);
  small = limit;
  small.rlim_cur = 2048;
  CHECK(setrlimit(RLIMIT_FSIZE, &small) == 0);
  FAILS(MXT_ERROR_IO, "(os error 27)", mxt_model_save(model, dir));
  CHECK(setrlimit(RLIMIT_FSIZE, &limit) == 0);
  CHECK(sigpending(&pending) == 0 && sigismember(&pending, SIGXFSZ) == 0);
  mxt_model_free(model);
  OK(mxt_model_load(engine, dir, &model));
  OK(mxt_model_save(model, dir));
  mxt_model_free(model);
  mxt_engine_free(engine);
}

int main(int argc, char **argv) {
  char *locale, folder[4096], folder_after[4096];
  CHECK(argc == 2);
  /* The locale that the test has prepared, with a decimal comma where the system has one. */
  CHECK(setlocale(LC_ALL, "") != NULL);
  const char comma = *localeconv()->decimal_point;
  CHECK(getenv("EXPECT_COMMA") == NULL || comma == ',');
  locale = strdup(setlocale(LC_ALL, NULL));
  const mode_t umask_before = umask(027);
  umask(027);
  CHECK(getcwd(folder, sizeof folder) != NULL);

  floating_point(in_folder(argv[1], "checkpoint"));
  signals(getenv("UNDER_VALGRIND") == NULL);
  file_limit(in_folder(argv[1], "limited"));

  CHECK(strcmp(setlocale(LC_ALL, NULL), locale) == 0 && *localeconv()->decimal_point == comma);
  CHECK(umask(umask_before) == 027);
  CHECK(getcwd(folder_after, sizeof folder_after) != NULL && strcmp(folder, folder_after) == 0);
  free(locale);
  return 0;
}
