/* Trains a small GPT on all processes of an MPI job: the group of ranks is two callbacks.
 *
 *   cargo build --release
 *   mpicc -std=c99 examples/c/train_mpi.c -Iinclude -Ltarget/release -lmxfp4train -o train_mpi
 *   ln -s libmxfp4train.so target/release/libmxfp4train.so.0
 *   LD_LIBRARY_PATH=target/release mpirun -np 4 ./train_mpi [TOKENS.bin]
 *
 * With four lanes 1, 2 and 4 processes print the same numbers. On GPUs give each process its own by
 * options.device, "cuda:0" and so on by its rank on its host. */
#include "mxfp4train.h"

#include <mpi.h>
#include <stdio.h>
#include <stdlib.h>

static const char rhyme[] =
    "Humpty Dumpty sat on a wall, Humpty Dumpty had a great fall; "
    "all the king's horses and all the king's men could not put Humpty together again. ";

/* Ends all processes with the library's message when a call of one failed. */
static void check(mxt_status status) {
  if (status == MXT_OK) return;
  fprintf(stderr, "%s: %s\n", mxt_status_string(status), mxt_last_error());
  MPI_Abort(MPI_COMM_WORLD, 1);
}

/* 0, or what ends the group. MPI counts in int; the library sends far less at once. */
static int32_t all_to_all(void *user_data, const void *send, void *receive, size_t bytes_per_rank) {
  const int count = (int)bytes_per_rank;
  return MPI_Alltoall(send, count, MPI_BYTE, receive, count, MPI_BYTE, *(MPI_Comm *)user_data);
}

static int32_t all_gather(void *user_data, const void *send, void *receive, size_t bytes_per_rank) {
  const int count = (int)bytes_per_rank;
  return MPI_Allgather(send, count, MPI_BYTE, receive, count, MPI_BYTE, *(MPI_Comm *)user_data);
}

/* Without this MPI ends all processes at once, with a text of its own. */
static void give_up(void *user_data) { MPI_Abort(*(MPI_Comm *)user_data, 1); }

static int32_t print_step(void *user_data, const mxt_step_stats *step, const mxt_eval_stats *eval) {
  if (*(const int *)user_data != 0) return 0;
  printf("step %2llu  loss %.6f  norm %.6f\n", (unsigned long long)step->step, (double)step->loss,
         (double)step->grad_norm);
  if (eval != NULL) printf("evaluation %.6f nats a token\n", (double)eval->loss);
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
  int rank = 0, size = 1, given = 0;
  /* The library calls back on the thread that calls it: MPI_THREAD_FUNNELED is enough. */
  MPI_Init_thread(&argc, &argv, MPI_THREAD_FUNNELED, &given);
  MPI_Comm comm;
  MPI_Comm_dup(MPI_COMM_WORLD, &comm); /* so that no message of the program's own gets between */
  MPI_Comm_set_errhandler(comm, MPI_ERRORS_RETURN);
  MPI_Comm_rank(comm, &rank);
  MPI_Comm_size(comm, &size);

  mxt_group group;
  check(mxt_group_init(&group, sizeof group));
  group.rank = (uint32_t)rank;
  group.size = (uint32_t)size;
  group.all_to_all = all_to_all;
  group.all_gather = all_gather;
  group.abort = give_up;
  group.user_data = &comm;
  mxt_engine_options options;
  check(mxt_engine_options_init(&options, sizeof options));
  options.group = &group;
  mxt_engine *engine = NULL;
  check(mxt_engine_new(&options, &engine));
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

  mxt_trainer_options how;
  check(mxt_trainer_options_init(&how, sizeof how));
  how.batch_size = 2;
  how.lanes = 4; /* the step is the sum of four, on 1, 2 or 4 processes */
  how.lr = 3e-3f;
  mxt_trainer *trainer = NULL;
  check(mxt_trainer_new(model, &how, &trainer));

  mxt_run_options run;
  check(mxt_run_options_init(&run, sizeof run));
  run.steps = 20;
  run.eval_dataset = dataset;
  run.save_dir = "checkpoint"; /* rank 0 writes */
  run.on_step = print_step;
  run.user_data = &rank;
  check(mxt_trainer_run(trainer, dataset, &run, NULL));

  mxt_trainer_free(trainer);
  mxt_model_free(model);
  mxt_dataset_free(dataset);
  mxt_engine_free(engine);
  MPI_Comm_free(&comm);
  MPI_Finalize();
  return 0;
}
