// mxfp4train.h: train GPT models from any program, with the backward pass in MXFP4.
//
// This file is made from the sources of the library; what it says is the specification.
//
// A program in outline, without the checks:
//
//   mxt_engine *engine = NULL;                          // a device and its threads
//   mxt_engine_new(NULL, &engine);
//
//   mxt_model_config config;                            // the shape of the model
//   mxt_model_config_init(&config, sizeof config);
//   config.layers = 6;
//   mxt_model *model = NULL;
//   mxt_model_new(engine, &config, &model);
//
//   mxt_dataset *dataset = NULL;                        // tokens
//   mxt_dataset_open("data/train.bin", &dataset);
//
//   mxt_trainer *trainer = NULL;                        // optimizer and schedule
//   mxt_trainer_new(model, NULL, &trainer);
//   for (int step = 0; step < 1000; step++) {
//     mxt_step_stats stats;
//     stats.struct_size = sizeof stats;
//     mxt_trainer_step(trainer, dataset, &stats);       // stats.loss, stats.grad_norm...
//   }
//   mxt_trainer_save(trainer, "out");                   // mxt_trainer_load goes on from there
//
//   mxt_trainer_free(trainer);
//   mxt_dataset_free(dataset);
//   mxt_model_free(model);
//   mxt_engine_free(engine);
//
// 1. Handles. mxt_engine, mxt_model, mxt_decoder, mxt_dataset, mxt_trainer and mxt_snapshot are opaque.
//    Whoever makes a handle frees it with the function of its kind; _free(NULL) does nothing. What was
//    made from a handle keeps alive what it needs of it, so handles may be freed in any order, from any
//    thread, and from callbacks. A freed handle must not be used.
//
// 2. Errors. A function that can fail returns an mxt_status: 0 (MXT_OK) or a negative MXT_ERROR_
//    number. The message (what was expected, what came, and the fix where one is known) is in
//    mxt_last_error of the calling thread and, for calls with a handle, on the handle that is the
//    first argument (mxt_trainer_last_error and the like). Functions that return a number or a text
//    of a handle return 0 or NULL for a NULL handle.
//    Where memory runs out, a call returns MXT_ERROR_OUT_OF_MEMORY. Small pieces come from a reserve of
//    1.5 MiB inside the library then. Once a quarter of it is in use, calls that make or change something
//    are refused at once, until handles are freed; freeing and asking for errors always works. What may
//    still end the process then is code of others: the C library, for a few bytes, where a thread
//    starts, ends or first uses a library that dlopen loaded, and on a GPU the driver.
//    Any call can return MXT_ERROR_PANIC and MXT_ERROR_OUT_OF_MEMORY, calls with a handle
//    MXT_ERROR_POISONED and MXT_ERROR_FORKED, and what works on a GPU MXT_ERROR_DEVICE; the lists of
//    errors below leave them out.
//
// 3. Outputs are written only when a call succeeds. Pointers must not be NULL unless the function
//    says what NULL means. Strings that go in end with a zero byte and are borrowed for the call; they
//    are UTF-8, except that paths are the system's own bytes, whatever their encoding. Each function
//    says how long a string that comes out is valid. What goes in must not change during the call;
//    where another thread changes an array or a string even so, the call fails or uses either value.
//
// 4. Structs begin with struct_size and grow only at the end, so that a program compiled with an
//    older header works with a newer library. Structs that the caller fills have a function
//    mxt_..._init(&it, sizeof it) that sets the defaults; call it first, then change fields. Structs
//    that the library fills need their struct_size set to their sizeof before the call. A program
//    compiled with a newer header works too as long as the fields that the library does not know
//    are zero. Fields that are one of several values are int32_t and are checked.
//
// 5. Threads. Different handles are independent. A handle may move between threads. Functions that
//    take a handle as const may be called on it by several threads at once; all others need it for
//    themselves. A model and its trainers share the weights and count as one in this; a decoder
//    reads its model while it makes logits, as a call with a const model does. What breaks this rule gets MXT_ERROR_BUSY, and nothing is corrupted or waited for; only freeing a handle
//    while another thread is about to use it is beyond what the library can see.
//    A thread that is cancelled (pthread_cancel) ends after the call that it is in: cancellation is off
//    in calls, and in the callbacks that they make. Where it may act at any instruction
//    (PTHREAD_CANCEL_ASYNCHRONOUS), one that comes as a call just begins or ends may end the process.
//    A thread that calls needs 128 KiB of stack, with a GPU what the driver takes besides. Worker threads
//    have stacks of 2 MiB, whatever RUST_MIN_STACK says.
//    The library's worker threads belong to an engine, block all signals but faults, and have ended
//    when the engine and all that was made from it is freed; a dataset of more than 256 MiB has one too
//    for a while. After fork() the child has none of them:
//    there, calls on handles of the parent return MXT_ERROR_FORKED, except those that return a fixed
//    number or text and _free. A child that wants to train makes an engine of its own.
//
// 6. Callbacks are a function and a user_data pointer, run only on the thread that is inside the
//    call, and return 0 to go on or another number to stop. See each for what it may do: mxt_step_fn
//    may do everything; mxt_token_fn, mxt_loss_fn, mxt_log_fn, those of mxt_file_callbacks, mxt_allocate_fn,
//    mxt_deallocate_fn and mxt_user_data_free_fn must not let a C++ exception out, which would end the
//    process.
//
// 7. A guest in your process: no output, no signal handlers, no exit, no changes of the environment,
//    the locale or the signal mask. A call computes in the default floating-point mode, whatever the
//    host's is (flushed denormals, directed rounding), and restores the host's, also for callbacks.
//    Log lines go to the engine's callback, or nowhere. A file of a save that would outgrow the
//    process's limit (ulimit -f) is MXT_ERROR_IO, and no SIGXFSZ comes. Should a defect make the
//    library panic, the call returns MXT_ERROR_PANIC with a message that says where, and the handle is
//    poisoned: from then on it can be asked for its last error and freed, and everything else returns
//    MXT_ERROR_POISONED.
//
// 8. Randomness and reproducibility. Everything random comes from the engine's seed. The same seed,
//    data, build and instruction set give the same losses bit for bit, on any number of threads, and
//    whether or not a run was saved and loaded on the way. Instruction sets (portable, AVX2, AVX-512,
//    AMX) and kinds of GPU differ in the last bits of sums, the system's libm may in those of logarithms
//    and powers, and so do the runs that follow from them.
//    mxt_build_info names the set that this processor gets; the environment variable MXT_CPU_ISA
//    (portable, avx2, avx512 or amx) names another for engines that are made afterwards, so that
//    machines of different kinds give the same bits.
//
// 9. Several processes or threads can share every step of a run, as ranks of a group that the host
//    carries bytes for: see mxt_group. With the same lanes, the bits are the same on any number of ranks.
//
// 10. Versions. MXT_VERSION_NUMBER is the version of this header, mxt_version_number() that of the
//    library that is running; MXT_ABI_VERSION and mxt_abi_version() must be equal. While the major
//    version is 0, minor versions may change what is written here, and then the ABI version changes.
//    The library exports no symbols but mxt_ ones, and stays loaded after dlclose.


#ifndef MXFP4TRAIN_H
#define MXFP4TRAIN_H

#include <stddef.h>
#include <stdint.h>

// Version of this header, major part. It grows when programs have to be changed.
#define MXT_VERSION_MAJOR 0

// Version of this header, minor part. It grows with additions.
#define MXT_VERSION_MINOR 1

// Version of this header, patch part. It grows with corrections.
#define MXT_VERSION_PATCH 0

// Version of this header as one number that can be compared: 1,002,003 for 1.2.3.
#define MXT_VERSION_NUMBER (((MXT_VERSION_MAJOR * 1000000) + (MXT_VERSION_MINOR * 1000)) + MXT_VERSION_PATCH)

// Version of the binary interface, the number in libmxfp4train.so.N. It changes only when
// programs that were compiled with an earlier header could not run with the library.
#define MXT_ABI_VERSION 0

// Most dimensions that a tensor can have.
#define MXT_MAX_RANK 4

// In place of a target: the position is no part of the loss, as -100 is in PyTorch.
#define MXT_IGNORED 4294967295

// What mxt_file_open_fn returns where there is no file of the name.
#define MXT_NO_SUCH_FILE 1

// The values of mxt_status. A value never changes its meaning and is never used again.
typedef enum mxt_status_code {
  // The call did what it says.
  MXT_OK = 0,
  // A pointer that must not be NULL is NULL.
  MXT_ERROR_NULL = -1,
  // An argument or an option has a value that the call cannot use.
  MXT_ERROR_INVALID_ARGUMENT = -2,
  // A string is not UTF-8.
  MXT_ERROR_UTF8 = -3,
  // The struct_size of a struct is none that this library knows, or a part of the struct that it
  // does not know is not zero.
  MXT_ERROR_STRUCT_SIZE = -4,
  // Another call is inside this object: from another thread, or this call came from a callback.
  MXT_ERROR_BUSY = -5,
  // A panic in an earlier call left this object unusable: free it.
  MXT_ERROR_POISONED = -6,
  // A defect of the library showed itself inside this call. The message says where; please
  // report it. The handle is poisoned, the process and all other handles are sound.
  MXT_ERROR_PANIC = -7,
  // A file or folder cannot be opened, read, written or renamed.
  MXT_ERROR_IO = -8,
  // A file is damaged, truncated or of a kind that this version does not read.
  MXT_ERROR_FORMAT = -9,
  // A file is sound but does not fit what it is used with, or the ranks of a group do not have
  // alike what they must.
  MXT_ERROR_MISMATCH = -10,
  // A token is not below the vocabulary size of the model.
  MXT_ERROR_TOKEN_RANGE = -11,
  // More memory is needed than the limit allows or the system gives.
  MXT_ERROR_OUT_OF_MEMORY = -12,
  // The device or this build cannot do it; the message says what can be done instead.
  MXT_ERROR_UNSUPPORTED = -13,
  // A loss, a gradient norm or a weight is NaN or infinite.
  MXT_ERROR_NOT_FINITE = -14,
  // The model has no tensor of this name.
  MXT_ERROR_NO_SUCH_TENSOR = -15,
  // The caller's buffer is too small; the message says how much is needed.
  MXT_ERROR_BUFFER_TOO_SMALL = -16,
  // The handle was made before fork() in a parent of this process. Free it, or leave it.
  MXT_ERROR_FORKED = -17,
  // A GPU failed. The handle is poisoned: free it and what was made on the same device.
  MXT_ERROR_DEVICE = -18,
  // A stop was asked for (mxt_trainer_request_stop) while the call was at work. It has changed
  // nothing; no harm was done.
  MXT_STOPPED = -19,
  // Another rank of the group failed, is gone, or does not answer. The message has its rank and
  // its words. Where it said why, the call has changed nothing and the group goes on; otherwise
  // the group has ended, and every further collective call returns this at once.
  MXT_ERROR_PEER = -20,
} mxt_status_code;

// How much a log line matters.
typedef enum mxt_log_level {
  // Something is likely wrong, yet the call goes on.
  MXT_LOG_LEVEL_WARNING = 1,
  // What a user wants to know once: device, kernels, memory.
  MXT_LOG_LEVEL_INFO = 2,
  // Details for whoever looks for a fault.
  MXT_LOG_LEVEL_DEBUG = 3,
} mxt_log_level;

// The kind of model.
typedef enum mxt_architecture {
  // GPT-2: LayerNorm before each half of a block, learned positions, GELU, biases, and one
  // matrix for the embedding and the head unless tied_head is 0.
  MXT_ARCHITECTURE_GPT2 = 0,
  // Llama: RMSNorm before each half of a block, rotary positions, SwiGLU, heads that share keys and
  // values where kv_heads says so, and no biases. With qkv_bias it is a Qwen2, with qk_norm a Qwen3;
  // Mistral and SmolLM are Llamas. A tensor "self_attn.qkv_proj" of a block has the rows of q_proj,
  // k_proj and v_proj in files, and "mlp.gate_up_proj" those of gate_proj and up_proj; these names are
  // taken as well where one tensor is read or written.
  MXT_ARCHITECTURE_LLAMA = 1,
} mxt_architecture;

// How rotary positions are stretched.
typedef enum mxt_rope_scaling {
  // Not at all.
  MXT_ROPE_SCALING_NONE = 0,
  // All alike: positions are divided by rope_factor.
  MXT_ROPE_SCALING_LINEAR = 1,
  // As Llama 3.1 has it: what turns less than rope_low_frequency times in rope_original_context
  // positions is divided by rope_factor, what turns more than rope_high_frequency times is not.
  MXT_ROPE_SCALING_LLAMA3 = 2,
} mxt_rope_scaling;

// What the MLP of a block applies between its two layers.
typedef enum mxt_activation {
  // GELU in its tanh form, as GPT-2 has it ("gelu_new").
  MXT_ACTIVATION_GELU_TANH = 0,
  // GELU itself, by the error function ("gelu").
  MXT_ACTIVATION_GELU = 1,
} mxt_activation;

// The number format of a tensor's values as they cross this interface.
typedef enum mxt_dtype {
  // 32-bit floating point.
  MXT_DTYPE_F32 = 0,
} mxt_dtype;

// The linear layers of a block, as bits.
typedef enum mxt_lora_layer {
  // What makes queries, keys and values: attn.c_attn, or self_attn.qkv_proj of Llama's blocks.
  MXT_LORA_LAYER_ATTN_C_ATTN = 1,
  // What attention's result passes through: attn.c_proj, or self_attn.o_proj.
  MXT_LORA_LAYER_ATTN_C_PROJ = 2,
  // The first of the MLP: mlp.c_fc, or mlp.gate_up_proj.
  MXT_LORA_LAYER_MLP_C_FC = 4,
  // The second of the MLP: mlp.c_proj, or mlp.down_proj.
  MXT_LORA_LAYER_MLP_C_PROJ = 8,
} mxt_lora_layer;

// What the weights of a saved model are stored as.
typedef enum mxt_stored_weights {
  // f32, as they are.
  MXT_STORED_WEIGHTS_F32 = 0,
  // f16, to nearest. Numbers that round above 65504 are refused.
  MXT_STORED_WEIGHTS_F16 = 1,
  // bf16, to nearest.
  MXT_STORED_WEIGHTS_BF16 = 2,
  // The linear layers and a head of its own in MXFP4, 4.25 bits a weight, as a decoder in MXFP4 has
  // them; all else in f32. Read by this library alone.
  MXT_STORED_WEIGHTS_MXFP4 = 3,
} mxt_stored_weights;

// What a model's linear layers and its head are computed in where it writes text.
typedef enum mxt_decoder_weights {
  // f32; on a GPU bf16 where a trainer keeps the weights with master=split.
  MXT_DECODER_WEIGHTS_F32 = 0,
  // bf16, with sums in f32.
  MXT_DECODER_WEIGHTS_BF16 = 1,
  // MXFP4, 4.25 bits a weight; what they are multiplied with is in bf16 on a GPU, and on a
  // processor in 8 bits.
  MXT_DECODER_WEIGHTS_MXFP4 = 2,
} mxt_decoder_weights;

// Who guesses the next tokens, for the model to check several at once.
typedef enum mxt_draft {
  // Nobody: a token takes a pass of its own.
  MXT_DRAFT_NONE = 0,
  // The text: what followed its last three, two or one tokens where they stood before. Gains where
  // a text repeats itself, as code does.
  MXT_DRAFT_NGRAM = 1,
  // The model with its weights in MXFP4, a copy that takes 4.25 bits a weight more. On a GPU for
  // weights in bf16.
  MXT_DRAFT_MXFP4 = 2,
  // The same, which the text guesses for.
  MXT_DRAFT_MXFP4_NGRAM = 3,
} mxt_draft;

// What a token is in a file without a header to say it.
typedef enum mxt_token_type {
  // Found out by a look at the tokens: 16 bits, unless they must be 32 or 64. A file in which
  // they may be either is refused.
  MXT_TOKEN_TYPE_AUTO = 0,
  // Two unsigned bytes.
  MXT_TOKEN_TYPE_U16 = 1,
  // Four unsigned bytes.
  MXT_TOKEN_TYPE_U32 = 2,
  // Eight signed bytes.
  MXT_TOKEN_TYPE_I64 = 3,
  // One unsigned byte.
  MXT_TOKEN_TYPE_U8 = 4,
  // Four signed bytes.
  MXT_TOKEN_TYPE_I32 = 5,
} mxt_token_type;

// The curve of the learning rate after the warm-up.
typedef enum mxt_schedule {
  // lr for ever.
  MXT_SCHEDULE_CONSTANT = 0,
  // Half a cosine from lr down to min_lr at total_steps.
  MXT_SCHEDULE_COSINE = 1,
  // A straight line from lr down to min_lr at total_steps.
  MXT_SCHEDULE_LINEAR = 2,
  // lr, then a straight line down to min_lr over the last decay_steps.
  MXT_SCHEDULE_TRAPEZOID = 3,
} mxt_schedule;

// How the gradients of ranks get from GPU to GPU. It changes no bit where they are sent as f32
// (gradient_wire). On processors they go through the callbacks.
typedef enum mxt_transport {
  // As MXT_TRANSPORT_PEER where that can be, else as MXT_TRANSPORT_NCCL, else as
  // MXT_TRANSPORT_HOST, with a warning to the log.
  MXT_TRANSPORT_AUTO = 0,
  // By the callbacks, through the memory of the host.
  MXT_TRANSPORT_HOST = 1,
  // By NCCL, of which every rank needs the same release (libnccl.so.2, 2.19 or newer), and a GPU of
  // its own. Where it cannot be, mxt_engine_new returns MXT_ERROR_UNSUPPORTED and says why.
  MXT_TRANSPORT_NCCL = 2,
  // In each other's memory: of at most 8 GPUs of one host that reach it (over NVLink or PCIe),
  // each of one rank. Likewise.
  MXT_TRANSPORT_PEER = 3,
} mxt_transport;

// What gradients are sent as from rank to rank.
typedef enum mxt_wire {
  // As they are: 4 bytes a number.
  MXT_WIRE_F32 = 0,
  // To nearest: 2 bytes.
  MXT_WIRE_BF16 = 1,
  // E4M3 to nearest, with a scale for 32 numbers: 1.03 bytes.
  MXT_WIRE_FP8 = 2,
  // E2M1 with a scale for 32 numbers, rotated and rounded stochastically, so that the mean is the
  // gradient: 0.53 bytes.
  MXT_WIRE_MXFP4 = 3,
} mxt_wire;

// Why a run ended.
typedef enum mxt_run_end {
  // All steps are done.
  MXT_RUN_END_FINISHED = 0,
  // The callback returned a number other than 0.
  MXT_RUN_END_CALLBACK = 1,
  // mxt_trainer_request_stop was called, maybe during a step or an evaluation, which was given
  // up.
  MXT_RUN_END_REQUEST = 2,
} mxt_run_end;

// Tokens to train on: files that are mapped into memory, tokens of the host, or windows that it
// fills. It is never changed, so any number of threads and trainers may use it at once. Make with
// one of the mxt_dataset_open or mxt_dataset_from functions, free with mxt_dataset_free.
//
// All its tokens are checked against a model's vocabulary before the first step or evaluation of a
// trainer: at once up to 256 MiB, which takes some 0.1 s; else by a thread of the dataset while
// the training goes on, and what it finds is the error of the next step. The thread blocks all
// signals but faults, and has ended when mxt_dataset_free returns and no other call uses the
// dataset.
//
// Nothing that happens to a file ends the process. Where its tokens are not there any more,
// because it has become shorter or its disk fails, the call that needs them returns MXT_ERROR_IO;
// a trainer is then as before the call.
typedef struct mxt_dataset mxt_dataset;

// Texts of a model that grow: tokens in, the logits of what comes next out, of which keys and values
// are kept, so that a token takes one row. A call needs the decoder for itself, and for logits the
// model as one that reads it; several decoders of one model may run at once. It follows its model:
// where weights have been changed, the next logits are those of the new ones. Make with
// mxt_decoder_new, free with mxt_decoder_free.
typedef struct mxt_decoder mxt_decoder;

// A device with its worker threads. Everything else is made from one. It is never changed, so any
// number of threads may use it at once. Make with mxt_engine_new, free with mxt_engine_free.
typedef struct mxt_engine mxt_engine;

// A set of named files that checkpoints are loaded from and saved to, in place of a folder: the
// host's (mxt_files_from_callbacks) or in memory (mxt_files_in_memory). Their bytes are those of a
// folder's files: "config.json" and "model.safetensors" and, of a trainer, "trainer.json" and
// "trainer.safetensors". Loads read a model in several files with an index, too.
//
// What uses it needs it for itself; loads from memory may run at once on several threads. Make
// with one of the two, free with mxt_files_free.
typedef struct mxt_files mxt_files;

// A model: its shape and its weights. Several handles can be the same model (see
// mxt_trainer_model). Calls that change it, or that take it without const, need it for themselves;
// calls with a const model may run at once on several threads. Make with mxt_model_new,
// mxt_model_load or mxt_trainer_model, free with mxt_model_free.
typedef struct mxt_model mxt_model;

// A copy in the host's memory of all that mxt_trainer_save would write, which a thread of the host
// saves while training goes on: weights in f32, and what the optimizer and the recipe keep, in the
// bytes that they take on the device. It shares nothing with its trainer but the model, which stays
// alive with it, so that calls on either do not meet. Make with mxt_trainer_snapshot, free with
// mxt_snapshot_free.
typedef struct mxt_snapshot mxt_snapshot;

// A model in training: weights, moments, schedule, and the number of steps done. It needs its
// model for itself while a call is inside: then calls on the model, on the trainer and on other
// trainers of that model return MXT_ERROR_BUSY. Make with mxt_trainer_new or mxt_trainer_load,
// free with mxt_trainer_free.
typedef struct mxt_trainer mxt_trainer;

// What a call returns: MXT_OK, or one of the negative numbers of mxt_status_code. Later versions
// may add codes, so treat an unknown negative number as an error.
typedef int32_t mxt_status;

// Hands out and takes in blocks of `bytes_per_rank` bytes, one for each rank: block r of `send` goes
// to rank r, and block r of `receive` came from it, this rank's own included. The buffers are
// borrowed for the call and do not overlap. MPI_Alltoall of MPI_BYTE is one; a call has some tens
// of MiB at most.
//
// Returns 0 when this rank's part is done; any other number ends the group: the call that needed it
// returns MXT_ERROR_PEER, and so does every later one, at once. It must give up by itself, by a
// deadline or when a connection breaks, where another rank is gone.
//
// Runs on the thread of the call that needs it. It must not throw, longjmp, or call the library.
typedef int32_t (*mxt_all_to_all_fn)(void *user_data,
                                     const void *send,
                                     void *receive,
                                     size_t bytes_per_rank);

// Gathers `bytes_per_rank` bytes of every rank: `send` of all ranks, one behind the other in their
// order, become `receive`, this rank's own included. MPI_Allgather of MPI_BYTE is one. All else as
// for mxt_all_to_all_fn.
typedef int32_t (*mxt_all_gather_fn)(void *user_data,
                                     const void *send,
                                     void *receive,
                                     size_t bytes_per_rank);

// This rank gives up: calls in which other ranks wait for it should fail. Called at most once, on the
// thread of the call that failed, and nothing else is called then. It must not throw, longjmp, or
// call the library.
typedef void (*mxt_abort_fn)(void *user_data);

// Gives back what a `user_data` pointer stands for. It must not throw or longjmp.
typedef void (*mxt_user_data_free_fn)(void *user_data);

// Ranks that train one model together, of which this program (or this thread of it) is one. Fill it
// with mxt_group_init, and put it into mxt_engine_options.
//
// Every rank computes its part of each step and has all of the model. For given `lanes` of the
// trainer, losses, weights and files are the same bits on any number of ranks that the lanes allow.
//
// Calls on an engine with a group, and on what is made from it, that are collective:
// mxt_engine_new, mxt_trainer_new, _load, _load_as, _step, _step_unless_stopped, _step_tokens,
// _update, _eval, _save and _run. All ranks make them in the same order with the same arguments,
// but for tokens that a rank brings, and folders: rank 0 writes to its own. What fails on one
// rank, fails on all, before anything is changed: the rank itself has its error, the others
// MXT_ERROR_PEER with its words, or MXT_STOPPED. Ranks that do not have alike what they must get
// MXT_ERROR_MISMATCH with what differs. What the library refuses before it begins (MXT_ERROR_NULL,
// _STRUCT_SIZE, _BUSY, _POISONED, _INVALID_ARGUMENT of fields of this struct) the others do not
// hear of: they wait, and the rank has to make the call again, or end. All other calls, and
// freeing, are a rank's own, but for mxt_trainer_snapshot and mxt_snapshot_renew with
// shard_states. One group makes one call at a time: a second thread that makes another one on the
// same engine waits for it.
//
// Where NCCL carries gradients, it starts threads of its own in mxt_engine_new, and takes about
// a GiB of the GPU beside what is planned. It is given back on a thread that mxt_engine_free, or what
// frees the last of the engine, waits half a second for.
typedef struct mxt_group {
  // Set by mxt_group_init.
  size_t struct_size;
  // Which rank this is, from 0 on. Default 0.
  uint32_t rank;
  // How many there are. 1 (default) is no group: nothing below is used.
  uint32_t size;
  // Called for gradients, at every step.
  mxt_all_to_all_fn all_to_all;
  // Called for all else.
  mxt_all_gather_fn all_gather;
  // Called when this rank gives up, or NULL (default).
  mxt_abort_fn abort;
  // Passed to the functions above. It must stay valid until the engine and everything made from it
  // is freed, or until `user_data_free` is called with it.
  void *user_data;
  // Called with `user_data` exactly once for each call of mxt_engine_new that succeeds, when the
  // library will never call the functions above again; as log_user_data_free of
  // mxt_engine_options. Where there is one rank, that is the end of mxt_engine_new itself. NULL
  // (default): nothing is called.
  mxt_user_data_free_fn user_data_free;
  // Longest wait for another rank where gradients go from GPU to GPU, in seconds: a GPU cannot
  // tell a rank that is gone from one that is slow, and the callbacks show one that is gone
  // earlier. The call returns MXT_ERROR_PEER then. At least 1. Default 600.
  uint64_t timeout_seconds;
  // One of mxt_transport, the same on all ranks. Default MXT_TRANSPORT_AUTO.
  int32_t transport;
  // 1: the optimizer's states of each tensor are kept by one rank alone, which updates it and
  // gives it to all others, so that a rank takes a part of their memory (ZeRO-1); the same on
  // all ranks. It changes no bit. For adamw and muon without ramping; mxt_trainer_watch_updates
  // is MXT_ERROR_INVALID_ARGUMENT then. mxt_trainer_snapshot is collective, and that of rank 0
  // has all that there is to save. What a rank kept is lost with it, and where a group ends
  // within a step, weights may be those of within it: go on from a checkpoint then. 0 (default):
  // every rank keeps all.
  int32_t shard_states;
  // One of mxt_wire, the same on all ranks: what gradients are sent as, for links that are
  // slower than what computes gradients. Sums are made in f32. All but MXT_WIRE_F32 change
  // losses a little, and make their bits those of so many ranks; not with MXT_TRANSPORT_PEER,
  // and MXT_TRANSPORT_AUTO passes over that. Default MXT_WIRE_F32.
  int32_t gradient_wire;
  // Must be 0.
  int32_t reserved;
} mxt_group;

// Receives a log line. `level` is one of mxt_log_level, `message` a UTF-8 line without a line
// end, borrowed for the call.
//
// Runs on the thread that is inside the call that logs, and on several at once where several
// threads use the engine. It must not throw or longjmp, and calls on the object whose call logs
// return MXT_ERROR_BUSY.
typedef void (*mxt_log_fn)(void *user_data, int32_t level, const char *message);

// Gives `bytes` bytes of memory, at least one, at a multiple of `alignment`, a power of two, with
// whatever is in them; NULL where there is none, which is MXT_ERROR_OUT_OF_MEMORY of the call that
// needs them. Nothing else may use them until they are given to mxt_deallocate_fn.
//
// Runs on the thread that is inside a call, and on several at once where several threads use the
// engine. It must not throw, longjmp, or call the library.
typedef void *(*mxt_allocate_fn)(void *user_data, size_t bytes, size_t alignment);

// Takes back memory, with the size and the alignment that it was asked for with. All else as for
// mxt_allocate_fn.
typedef void (*mxt_deallocate_fn)(void *user_data, void *memory, size_t bytes, size_t alignment);

// What an engine is made from. Fill it with mxt_engine_options_init.
typedef struct mxt_engine_options {
  // Set by mxt_engine_options_init.
  size_t struct_size;
  // "cpu"; "cuda" or "cuda:0" for the first NVIDIA GPU, "cuda:1" for the second and so on;
  // "auto" for the first GPU where there is one that works, else the CPU. NULL is "cpu".
  // Borrowed for the call.
  const char *device;
  // Worker threads on the CPU, at most 1,024. 0 (default) takes one for each core that the
  // process may use, which ranks of a group on the same host share. Results do not depend on it. A
  // GPU takes none.
  size_t threads;
  // Seed of everything random: initial weights, data order, rounding, transforms. Default 1337.
  uint64_t seed;
  // Most bytes that one model with its trainer may take. 0 (default) sets no limit.
  uint64_t memory_limit;
  // Receives log lines. NULL (default): the library is silent.
  mxt_log_fn log;
  // Passed to `log`. It must stay valid until the engine and everything made from it is freed,
  // or until `log_user_data_free` is called with it.
  void *log_user_data;
  // A CUDA stream of the host (CUstream or cudaStream_t) in the primary context of the device,
  // where cudaStreamCreate makes them. All work of the engine is queued there, in the order of
  // the calls, between the host's own. It must not be capturing while a call is inside, and must
  // live until the engine and everything made from it is freed. NULL (default): the engine makes
  // its own. With device "auto" there must be a GPU then.
  void *cuda_stream;
  // Called with `log_user_data`, whatever it is, exactly once for each call of mxt_engine_new
  // that succeeds, when the library will never call `log` again: at the end of the call that
  // gives up the last of the engine and all that was made from it, on the thread of that call,
  // after the worker threads have ended. Where `log` is NULL, that is the end of mxt_engine_new
  // itself. An mxt_engine_new that fails never calls it: log_user_data is the caller's still. A
  // child made by fork() that frees the handles calls it as well, for its own copy of memory.
  // NULL (default): nothing is called.
  mxt_user_data_free_fn log_user_data_free;
  // The ranks that train together, of which this engine is one; see mxt_group. mxt_engine_new is
  // collective then. Borrowed for the call. NULL (default): it trains alone.
  const struct mxt_group *group;
  // Gives large memory of the host in place of the system: on the CPU weights, gradients,
  // states, activations and workspaces, and on every device what snapshots copy. It is asked for
  // some large blocks by the calls that make models, trainers, decoders and snapshots, not by
  // steps. NULL (default): the system maps them.
  mxt_allocate_fn allocate;
  // Takes back what `allocate` gave. Must be there where that is.
  mxt_deallocate_fn deallocate;
  // Passed to the two. It must stay valid until the engine and everything made from it is freed,
  // or until `allocator_user_data_free` is called with it.
  void *allocator_user_data;
  // Called with `allocator_user_data` exactly once for each call of mxt_engine_new that
  // succeeds, when all memory is given back and the library will never call the two again; as
  // log_user_data_free. Where `allocate` is NULL, that is the end of mxt_engine_new itself. NULL
  // (default): nothing is called.
  mxt_user_data_free_fn allocator_user_data_free;
} mxt_engine_options;

// What an engine, and all that was made from it, has in use of large memory. Set struct_size to
// sizeof(mxt_memory_use) before the call that fills it. Beside that there are buffers of a call,
// and what a GPU's driver takes.
typedef struct mxt_memory_use {
  // sizeof(mxt_memory_use), set by the caller.
  size_t struct_size;
  // Bytes of the device that are in use now: weights, gradients, states, activations and
  // workspaces of models, trainers and decoders. Of the CPU, this is memory of the host.
  uint64_t device_bytes;
  // The most of them at any time since the engine was made.
  uint64_t device_peak;
  // The most bytes that the device has for all that runs there, or memory_limit of the engine
  // where that is less; 0 where the system does not say.
  uint64_t device_limit;
  // Bytes of the host beside them that are in use now: snapshots.
  uint64_t host_bytes;
  // The most of them at any time since the engine was made.
  uint64_t host_peak;
  // The most bytes that the machine and the process's control groups give; 0 where the system
  // does not say.
  uint64_t host_limit;
} mxt_memory_use;

// The shape of a model. Fill it with mxt_model_config_init, which makes it GPT-2 small (124M).
typedef struct mxt_model_config {
  // Set by mxt_model_config_init.
  size_t struct_size;
  // Number of different tokens; tokens are 0 to vocab_size - 1. Default 50257.
  size_t vocab_size;
  // Longest sequence in tokens that the model can see. Default 1024.
  size_t context_length;
  // Number of blocks. Default 12.
  size_t layers;
  // Attention heads of a block; must divide channels where head_size is 0. Default 12.
  size_t heads;
  // Width of the model. Default 768.
  size_t channels;
  // Added to the variance in LayerNorm, or to the mean square in RMSNorm. Default 1e-5.
  float layer_norm_epsilon;
  // One of mxt_architecture. Default MXT_ARCHITECTURE_GPT2.
  int32_t architecture;
  // Width of the MLP inside a block. Default 0, which stands for 4 x channels, or in Llama's blocks
  // for 8/3 x channels, rounded up to a multiple of 256, and is what a model of that width reports.
  size_t mlp_channels;
  // One of mxt_activation, of GPT-2's blocks; Llama's have SwiGLU whatever it is. Default
  // MXT_ACTIVATION_GELU_TANH.
  int32_t activation;
  // 1 where the head shares its weights with the token embedding; 0 where it has a tensor
  // "lm_head.weight" (vocab_size, channels) of its own. Default 1.
  int32_t tied_head;
  // 1 where attention divides its scores by the square root of a head's width, 0 where it does
  // not. Default 1.
  int32_t scale_attention;
  // 1 where attention divides its scores by the number of its block, from 1 on, as well. Default
  // 0.
  int32_t scale_attention_by_layer;
  // What is trained beside linear layers, in the place of everything else, is of this rank (LoRA).
  // Default 0: nothing is.
  size_t lora_rank;
  // Over the rank, the factor of what is added to a layer's result. 0 (default) is twice the rank.
  // Without a rank neither this nor lora_layers counts.
  float lora_alpha;
  // Which linear layers of every block have it: some of mxt_lora_layer. 0 (default) is all.
  uint32_t lora_layers;
  // Heads of keys and values of a block, which divide heads; of Llama's blocks. Default 0, which
  // stands for heads and is what a model with as many reports.
  size_t kv_heads;
  // Channels of a head, an even number; of Llama's blocks. Default 0, which stands for channels /
  // heads and is what a model with such heads reports.
  size_t head_size;
  // Pair i of a head of n channels turns by rope_theta^(-2 i / n) a position; of Llama's blocks.
  // Default 10000.
  double rope_theta;
  // With rope_scaling MXT_ROPE_SCALING_LLAMA3: positions that the model saw before. Default 8192.
  size_t rope_original_context;
  // 1 where what makes queries, keys and values has a bias; of Llama's blocks, as in Qwen2. Default 0.
  int32_t qkv_bias;
  // 1 where every head of queries and keys is normalized; of Llama's blocks, as in Qwen3. Default 0.
  int32_t qk_norm;
  // One of mxt_rope_scaling. Default MXT_ROPE_SCALING_NONE, with which none of what follows counts.
  int32_t rope_scaling;
  // By how much, from 1 on. Default 1.
  float rope_factor;
  // Of MXT_ROPE_SCALING_LLAMA3, above 0. Default 1.
  float rope_low_frequency;
  // Of MXT_ROPE_SCALING_LLAMA3, above rope_low_frequency. Default 4.
  float rope_high_frequency;
} mxt_model_config;

// What there is to know about a tensor. Set struct_size to sizeof(mxt_tensor_info) before the
// call that fills it.
typedef struct mxt_tensor_info {
  // sizeof(mxt_tensor_info), set by the caller.
  size_t struct_size;
  // The name that Hugging Face's gpt2 or llama gives it, such as
  // "transformer.h.0.attn.c_attn.weight"; see mxt_architecture for what has no name there. Valid as
  // long as the model handle.
  const char *name;
  // Product of the dimensions.
  uint64_t element_count;
  // The dimensions, slowest first; those from rank on are 0. Linear weights of GPT-2
  // are (in, out), those of Llama's blocks (out, in).
  uint64_t shape[MXT_MAX_RANK];
  // Number of dimensions.
  uint32_t rank;
  // Number format of mxt_model_tensor_read and mxt_model_tensor_write: MXT_DTYPE_F32.
  int32_t dtype;
} mxt_tensor_info;

// Receives each token as it is sampled. Returns 0 to go on; any other number ends the text with
// this token.
//
// Runs on the thread that called mxt_model_generate or mxt_decoder_generate. It must not throw or
// longjmp, and of the first call's model, its trainer and its decoders' logits, of the second's decoder
// and its model's trainer, calls return MXT_ERROR_BUSY.
typedef int32_t (*mxt_token_fn)(void *user_data, uint32_t token);

// How tokens are sampled. Fill it with mxt_generate_options_init.
typedef struct mxt_generate_options {
  // Set by mxt_generate_options_init.
  size_t struct_size;
  // Most tokens to generate. Default 256.
  size_t max_tokens;
  // Keeps the k most likely tokens. 0 (default) keeps all.
  size_t top_k;
  // Seed of the draws: the same seed gives the same text. Default 1337.
  uint64_t seed;
  // Divides the logits: lower is more certain; 0 always takes the most likely token.
  // Default 0.8.
  float temperature;
  // Keeps the most likely tokens whose probabilities add up to p. 1 (default) keeps all.
  float top_p;
  // Receives each token as it is sampled, or NULL (default).
  mxt_token_fn on_token;
  // Passed to on_token.
  void *user_data;
  // Tokens that end the text, such as the one that stands between documents. The one that was
  // sampled is the last of the new tokens, and on_token receives it. NULL (default) is none.
  // Borrowed for the call.
  const uint32_t *stop_tokens;
  // Number of stop_tokens. Default 0.
  size_t stop_token_count;
  // Keeps the tokens that are at least this part as likely as the most likely one. 0 (default)
  // keeps all.
  float min_p;
  // Divides the logits above 0 of tokens that the text has, prompt included, and multiplies those
  // below: above 1 the text repeats itself less. 1 (default) changes nothing.
  float repetition_penalty;
  // One of mxt_decoder_weights. Default MXT_DECODER_WEIGHTS_F32. Not looked at by
  // mxt_decoder_generate.
  int32_t weights;
  // 1 where a quarter of the context falls out of a text that exceeds it at once, so that all is
  // computed again only then; 0 (default) where a token falls out for each that comes, every one of
  // which takes the whole computation.
  int32_t slide;
  // One of mxt_draft: who guesses the next tokens, for several to be checked in one pass. The text
  // is the same whoever does. Default MXT_DRAFT_NONE.
  int32_t draft;
  // Tokens that are guessed at a time, up to 15; 0 (default) is as many as gain most.
  uint32_t draft_tokens;
  // Receives the number of tokens that were guessed, or NULL (default).
  uint64_t *drafted;
  // Receives how many of them the model chose, too, or NULL (default).
  uint64_t *accepted;
} mxt_generate_options;

// What a decoder is made for. Fill it with mxt_decoder_options_init.
typedef struct mxt_decoder_options {
  // Set by mxt_decoder_options_init.
  size_t struct_size;
  // Texts beside each other, numbered from 0, up to 65536. Default 1.
  size_t sequences;
  // Most tokens of each. 0 (default) is the model's context.
  size_t room;
  // One of mxt_decoder_weights. Default MXT_DECODER_WEIGHTS_F32.
  int32_t weights;
  // 1 keeps the weights in MXFP4, too, for drafts of mxt_decoder_generate; on a GPU beside weights in
  // bf16 alone, and not beside weights that are in MXFP4 themselves. Default 0.
  int32_t drafts;
} mxt_decoder_options;

// How a dataset is opened. Fill it with mxt_dataset_options_init.
typedef struct mxt_dataset_options {
  // Set by mxt_dataset_options_init.
  size_t struct_size;
  // One of mxt_token_type. Default MXT_TOKEN_TYPE_AUTO. For files without a header; a header is
  // believed. With another value than AUTO files are not refused for looking like text.
  int32_t token_type;
  // Not used; must be 0.
  int32_t reserved;
} mxt_dataset_options;

// Fills window `number` of a dataset: `tokens` gets sequence_length + 1 tokens, of which all but
// the last are inputs, and each but the first the target of the one before it; `weights` has
// sequence_length numbers, a factor of each target's loss, at least 0 and 1 before: 0 for what is
// not to be learned, as a prompt or padding. Both are borrowed for the call. The same number has
// to give the same window whenever it is asked for, so that a run that is resumed is the run that
// was not stopped.
//
// Returns 0; any other number ends the call that needs the window with MXT_ERROR_IO, and the
// trainer is as before it. A token outside of the vocabulary ends it with MXT_ERROR_TOKEN_RANGE, a
// weight that is not finite with MXT_ERROR_NOT_FINITE, one below 0 with
// MXT_ERROR_INVALID_ARGUMENT.
//
// Runs on the thread that is inside that call; on several threads at once where several trainers
// use the dataset. Calls on the trainer that it fills for, and on its model, return
// MXT_ERROR_BUSY. It must not throw or longjmp.
typedef int32_t (*mxt_window_fn)(void *user_data,
                                 uint64_t number,
                                 uint32_t *tokens,
                                 float *weights,
                                 size_t sequence_length);

// Fills window `number` of a dataset, as mxt_window_fn, and `documents` besides: for each of the
// sequence_length inputs the number of the document that it is of, which is 0 before.
typedef int32_t (*mxt_packed_window_fn)(void *user_data,
                                        uint64_t number,
                                        uint32_t *tokens,
                                        float *weights,
                                        uint32_t *documents,
                                        size_t sequence_length);

// What sequences of some length read of a dataset. Set struct_size to sizeof(mxt_coverage) before
// the call that fills it.
typedef struct mxt_coverage {
  // sizeof(mxt_coverage), set by the caller.
  size_t struct_size;
  // Windows of an epoch, of a sequence and one more token each; 0 where no file is long enough.
  uint64_t windows;
  // Files of the dataset.
  uint64_t files;
  // Files shorter than a window, which training never reads.
  uint64_t short_files;
  // Tokens of all files.
  uint64_t tokens;
  // Tokens of the files that training never reads.
  uint64_t short_tokens;
  // Tokens of the shortest file. Sequences of one less read every file.
  uint64_t shortest;
  // Tokens of the longest file.
  uint64_t longest;
} mxt_coverage;

// What a trainer is made from. Fill it with mxt_trainer_options_init.
typedef struct mxt_trainer_options {
  // Set by mxt_trainer_options_init.
  size_t struct_size;
  // Sequences that go through the model at once. Default 8.
  size_t batch_size;
  // Tokens of one sequence. 0 (default) takes the model's context length.
  size_t sequence_length;
  // Batches whose gradients are averaged into one optimizer step, those of all ranks of a group
  // together. 0 (default) takes as many as there are lanes, which without a group is 1.
  size_t accumulation;
  // Number formats of the linear layers: "fp32", "bf16", "fp8", "mxfp4-rht-sr", "nvidia-nvfp4" or
  // another name of docs/recipes.md (mxt_build_info lists them), which may be followed by switches
  // such as ",g=128". NULL (default) is "mxfp4-rht-sr". Borrowed for the call.
  const char *recipe;
  // Decay of the first moment. Default 0.9.
  float beta1;
  // Decay of the second moment. Default 0.95.
  float beta2;
  // Added to the square root of the second moment; above 0. Default 1e-8.
  float epsilon;
  // Decoupled weight decay of tensors of two or more dimensions. Default 0.1.
  float weight_decay;
  // Largest global gradient norm; longer gradients are scaled down to it. 0 turns it off.
  // Default 1.
  float clip;
  // One of mxt_schedule. Default MXT_SCHEDULE_CONSTANT.
  int32_t schedule;
  // Peak learning rate. Default 3e-4.
  float lr;
  // Learning rate at the end of the curve. Default 0.
  float min_lr;
  // Steps over which the rate rises linearly to lr. Default 0.
  uint64_t warmup_steps;
  // Step at which the curve ends, counted from the trainer's first step or from where
  // mxt_trainer_set_schedule set the schedule; later steps keep min_lr. Must be above
  // warmup_steps, except for MXT_SCHEDULE_CONSTANT. Default 0.
  uint64_t total_steps;
  // Length in steps of the descent of MXT_SCHEDULE_TRAPEZOID. Default 0.
  uint64_t decay_steps;
  // What is computed again in the backward pass to save memory: "nothing" (the default, and what
  // NULL is), "pointwise" (outputs of norms and GELU: a third less for activations, little time)
  // or "block" (all but the inputs of blocks: a step takes up to a third longer). Results do not
  // depend on it. Borrowed for the call.
  const char *recompute;
  // What moves the weights: "adamw" (the default, and what NULL is) or "stable-adamw" (AdamW
  // whose rate falls for a tensor whose gradients are larger than its second moment has seen
  // coming; it is made for a clip of 0, and helps most with a beta2 of 0.98 and above), or, only
  // with a clip of 0 and best with a beta2 of 0.999, "stable-spam" (gradients are normalized tensor by tensor, their outliers
  // clipped, moments start again every 1,000 steps: ",reset=1000"; with ",s=cosine"
  // beta1 and the decay of norms fall to half over total_steps, as the authors advise for language
  // models), "stable-spam-ref" (the same as
  // its authors' code counts) or "gradstab" (lengths of gradients alone); or "muon": the weights of
  // blocks' linear layers, each a matrix, move along their orthogonalized momentum (Keller Jordan,
  // "Muon: An optimizer for hidden layers in neural networks", 2024), and all else by AdamW. lr is
  // AdamW's rate, with beta1, beta2 and epsilon; matrices take lr times ",ratio=66.67" (the
  // reference's 0.02 over 3e-4), and weight decay times that; their momentum decays by
  // ",momentum=0.95", and is all that is kept of them. clip acts on all gradients, as ever (the
  // reference does not clip). Behind the name, with a comma, what its moments are kept in:
  // "moments=f32" (8 bytes a parameter, the default), "moments=bf16" (4) or "moments=int8" (2.25,
  // of the matrices of blocks; embeddings then have bf16): "adamw,moments=int8" ("muon" has half
  // of these bytes of matrices), or for comparison "moments=fp8" (3 of the matrices of blocks, 8 of
  // all else, as FP8-LM, arXiv 2310.18313, keeps them: E4M3 and fp16 with one scale a tensor, which
  // round more than "int8" does; "muon" has 1 of matrices); and what weights are kept as: "master=split" takes 2 bytes less
  // on a GPU than "master=f32", the default, and is not for recipes that need weights in f32;
  // and gradients: "gradients=bf16" takes 2 bytes less there for the matrices of blocks, rounds
  // them once, and wants an accumulation of 1. "adamw,ramping=500", only with a clip of 0,
  // updates weights less often that oscillate in the 4 bits of the forward pass ("tetrajet" and
  // its like; Q-Ramping, arXiv 2502.20853), which 30 steps find before every 500, and undo: such
  // a step takes as long; it takes 24 bytes a weight of blocks' linear layers and 12 a parameter
  // more, and no mxt_trainer_step_tokens. Borrowed for the call.
  const char *optimizer;
  // How many tokens of each sequence the blocks between the first and the last see in training,
  // drawn anew for each block and step (random-LTD, arXiv 2211.11586): "start=128,steps=60%"
  // begins with 128 and comes to all of them after 60 % of total_steps, "start=128,steps=5000"
  // after 5,000 steps of the schedule. start is a multiple of 16. On the way they grow by a
  // sixteenth of a sequence at a time, or with ",by=N" by N, a multiple of 16, too. The last
  // third of the steps, or more, should see all tokens, as evaluations do. Needs 3 layers. NULL
  // (default) drops nothing. Borrowed for the call.
  const char *token_drop;
  // Parts of a step that ranks of a group share, each of as many batches in a row, whose gradients
  // are then added in one fixed order: with the same lanes, losses, weights and files are the same
  // bits on any number of ranks that divides them by a power of two, and a run that is saved goes
  // on on any of these. 0 (default) takes as many as there are ranks. A rank with 2^k lanes keeps k
  // more copies of the gradients.
  size_t lanes;
  // The tensors that training leaves as they are, by patterns of their names with commas between
  // them: "transformer.wte.*,*.ln_*". '*' stands for any text, '?' for one character, `[ab]` for
  // one of some. They have no gradient and no state of the optimizer; a frozen matrix spares a
  // third of its products. A pattern that fits no name is an error. NULL (default) freezes
  // nothing. Borrowed for the call.
  const char *frozen;
  // 1 keeps documents apart that end with the token `document_end`. Default 0.
  int32_t has_document_end;
  // The token that ends a document, as 50256 does in GPT-2's vocabulary, with has_document_end: of
  // all windows and batches in which the host does not say which token is of which document,
  // attention looks at no document but a token's own, and positions are counted from where it
  // begins, so that packed documents are as if each were alone. Losses are of all targets as ever,
  // for weights say what counts. Saved with the run. Not with token_drop, nor a recipe with
  // "haste". Default 0.
  uint32_t document_end;
} mxt_trainer_options;

// What one optimizer step did. Set struct_size to sizeof(mxt_step_stats) before the call that
// fills it.
typedef struct mxt_step_stats {
  // sizeof(mxt_step_stats), set by the caller.
  size_t struct_size;
  // Steps done since step 0, this one included.
  uint64_t step;
  // Tokens trained on in this step.
  uint64_t tokens;
  // Wall-clock duration of the step in seconds.
  double seconds;
  // Mean cross-entropy of the step's tokens before the update, in nats a token.
  float loss;
  // Global norm of the gradient before clipping.
  float grad_norm;
  // Learning rate of the step.
  float lr;
  // tokens / seconds.
  float tokens_per_second;
  // Blocks of 32 numbers of the step's MXFP4 operands whose scale was raised, because it lay too
  // far below the largest of its tensor for the format that the GPU multiplies in. Their
  // rounding is coarser than their own scale would allow; with stochastic rounding it has no
  // bias still. 0 on CPUs.
  uint64_t raised_blocks;
  // Where mxt_trainer_watch_updates watches this step, the largest rms of a tensor (see
  // mxt_tensor_update), else NaN.
  float update_rms_max;
  // The index of that tensor for mxt_model_tensor_info, of equals the first; UINT32_MAX where
  // update_rms_max is NaN.
  uint32_t update_rms_tensor;
  // Of `seconds`, those in which this rank waited for others, and exchanged gradients with them. 0
  // without a group.
  double exchange_seconds;
} mxt_step_stats;

// What an evaluation found. Set struct_size to sizeof(mxt_eval_stats) before the call that fills
// it.
typedef struct mxt_eval_stats {
  // sizeof(mxt_eval_stats), set by the caller.
  size_t struct_size;
  // Tokens that were predicted.
  uint64_t tokens;
  // Wall-clock duration in seconds.
  double seconds;
  // Mean cross-entropy in nats a token.
  float loss;
  // exp(loss).
  float perplexity;
  // Where mxt_trainer_set_sharpness asks for it, else NaN as the three below: 100 (f' - f) /
  // (1 + f) of the loss f and the largest that it can be, f', when each logit y moves by up to
  // sharpness_epsilon (|y| + 1).
  float sharpness;
  // The same of the last tokens of the sequences alone.
  float sharpness_last;
  // How far logits may move.
  float sharpness_epsilon;
  // Mean over the tokens of the largest magnitude of a logit.
  float logit_amax;
  // Where the recipe has "haste", else NaN as the one below: the part of the operations of the
  // linear layers' products that merging channels would spare, 0 to 1 (1 - K / C of C channels
  // in K buckets). Nothing is faster here: products are computed at their full width.
  double spared_products;
  // The same, less the operations that merging itself adds; below 0 where that is more.
  double spared_all;
} mxt_eval_stats;

// Bytes that a model with its trainer takes, by purpose. Set struct_size to
// sizeof(mxt_memory_plan) before the call that fills it.
typedef struct mxt_memory_plan {
  // sizeof(mxt_memory_plan), set by the caller.
  size_t struct_size;
  // Weights.
  uint64_t weights;
  // Gradients.
  uint64_t gradients;
  // What the optimizer keeps, such as moments.
  uint64_t optimizer;
  // What the forward pass keeps for the backward pass, and the gradients that flow back.
  uint64_t activations;
  // Packed operands and other scratch memory.
  uint64_t workspace;
  // Sum of all.
  uint64_t total;
  // Sums of lanes that are kept until others are added to them. 0 where a rank has one lane. What
  // ranks exchange takes up to 32 MiB of the host besides, which is not in the plan.
  uint64_t exchange;
} mxt_memory_plan;

// Some rows of a batch on their way through a loss of the host's. Position t of sequence b is row
// b * sequence_length + t.
typedef struct mxt_logits {
  // sizeof(mxt_logits), set by the library.
  size_t struct_size;
  // (rows, vocab_size), row-major, in the host's memory: logits, to be replaced by the gradient of
  // each row's loss in them. Weights and divisor are not in it: the library multiplies.
  float *logits;
  // (rows): the loss of each row, NaN before, to be written.
  float *losses;
  // The number of the first row.
  uint64_t first_row;
  // How many there are.
  uint64_t rows;
  // Logits of a row.
  uint64_t vocab_size;
} mxt_logits;

// Makes losses of logits, and their gradients, for some rows of a batch: all rows come, in their
// order, each once, some 32 MiB of logits at a time, or 64 rows where these take more. What is
// written for rows whose target is ignored, or whose weight is 0, does not count. All that `rows`
// points to is borrowed for the call.
//
// Returns 0 to go on; any other number ends mxt_trainer_forward_backward with MXT_STOPPED. A number
// that it writes and that is not finite shows at mxt_trainer_update, as MXT_ERROR_NOT_FINITE.
//
// Runs on the thread that called mxt_trainer_forward_backward. Calls on that trainer and its model
// return MXT_ERROR_BUSY. It must not throw or longjmp.
typedef int32_t (*mxt_loss_fn)(void *user_data, const struct mxt_logits *rows);

// What a trainer learns from in one go: batch_size sequences of sequence_length positions, as the
// trainer's options have them. Fill it with mxt_batch_init. Arrays have a number for each position,
// sequence after sequence; they are borrowed for the call, and may lie in memory of the engine's GPU,
// written before the call or on the engine's stream.
typedef struct mxt_batch {
  // Set by mxt_batch_init.
  size_t struct_size;
  // Numbers in each array: batch_size * sequence_length.
  size_t count;
  // What the model reads.
  const uint32_t *tokens;
  // What it is to predict at each position, or MXT_IGNORED. The next token, for a language model.
  // May be NULL with `loss`, which is of all positions then.
  const uint32_t *targets;
  // A factor of each position's loss: 0 for what is not to be learned, as a prompt or padding.
  // NULL (default) is 1 for each.
  const float *weights;
  // What the sum of weighted losses is divided by, together with the divisors of the step's other
  // batches. 0 (default) is the sum of the weights of targets that are not ignored, so that the
  // step's loss is the mean over what counts. Weights that may be below 0, as advantages are, need
  // another one, such as `count`.
  double divisor;
  // Where the loss of each position is written, without its weight, 0 where the target is ignored;
  // or NULL (default).
  float *losses;
  // In place of cross-entropy, or NULL (default).
  mxt_loss_fn loss;
  // Passed to `loss`.
  void *user_data;
  // The number of the document that each token is of. Where it changes along a sequence another
  // document begins: attention looks at no document but a token's own, and positions are counted
  // from where it begins, so that each has the logits that it has alone. What is predicted across
  // an end counts unless its target is ignored or its weight is 0. Not with a token_drop or a
  // recipe with "haste". The first batch with more than one document in a sequence allocates 8
  // bytes a token. NULL (default) takes document_end of the trainer's options or, without it,
  // each sequence as one document.
  const uint32_t *documents;
} mxt_batch;

// Opens the file `name` for reading, such as "model.safetensors": stores in `*file` what the other
// functions get for it, which is not looked at, and in `*size` its bytes. `name` is borrowed for
// the call. Several files are open at once.
//
// Returns 0; MXT_NO_SUCH_FILE where there is none of this name, which is no failure; any other
// number ends the load.
typedef int32_t (*mxt_file_open_fn)(void *user_data, const char *name, void **file, uint64_t *size);

// Stores the `count` bytes from `offset` on in `to`, all of which lie in the file. A file is what
// it was when it was opened. Returns 0; any other number ends the load.
typedef int32_t (*mxt_file_read_fn)(void *user_data,
                                    void *file,
                                    uint64_t offset,
                                    void *to,
                                    size_t count);

// Ends the use of a file: called exactly once for each that was opened or created, also after a
// failure: a new file that has fewer bytes then than were announced is one of a save that has
// failed. Returns 0; any other number ends a save, of a file that was written.
typedef int32_t (*mxt_file_close_fn)(void *user_data, void *file);

// Begins a save. Returns 0; any other number ends it, and nothing else is called.
typedef int32_t (*mxt_files_begin_fn)(void *user_data);

// Begins the file `name`, of which `size` bytes are going to be written, and stores in `*file`
// what the other functions get for it. `name` is borrowed for the call. One file is written at a
// time. Returns 0; any other number ends the save.
typedef int32_t (*mxt_file_create_fn)(void *user_data, const char *name, uint64_t size, void **file);

// Appends `count` bytes to the file. Returns 0; any other number ends the save.
typedef int32_t (*mxt_file_write_fn)(void *user_data, void *file, const void *from, size_t count);

// Makes what was written since the save began the checkpoint, all of it at once. Files of the one
// before that were not written again are no part of it: mxt_file_open_fn must not find a
// "trainer.json" or "trainer.safetensors" any more where a model was saved without a training
// state. Returns 0; any other number says that this was not done, and the save is given up.
typedef int32_t (*mxt_files_commit_fn)(void *user_data);

// Gives up the save that was begun, for something failed: called once in place of a successful
// commit, when all its files are closed. What the files were before the save, they must be after
// it.
typedef void (*mxt_files_abort_fn)(void *user_data);

// Says why another of the functions has just failed, as a line for a person: UTF-8, read before
// anything else is called. NULL where there is nothing to say.
typedef const char *(*mxt_files_error_fn)(void *user_data);

// The host's functions for the files of a checkpoint. Fill it with mxt_file_callbacks_init.
//
// They run on the thread that is inside the call that loads or saves, in which only that call uses
// them. They may call the library, but calls on the mxt_files, on the trainer that is saved, and
// such as would change the model that is saved, return MXT_ERROR_BUSY. They must not throw or
// longjmp.
typedef struct mxt_file_callbacks {
  // Set by mxt_file_callbacks_init.
  size_t struct_size;
  // Passed to the functions below. It must stay valid until `user_data_free` is called with it.
  void *user_data;
  // Opens a file. NULL (default): nothing can be loaded.
  mxt_file_open_fn open;
  // Reads a piece of a file. Must be there where `open` is.
  mxt_file_read_fn read;
  // Closes a file. Must be there.
  mxt_file_close_fn close;
  // Begins a save, or NULL (default) where nothing is to be done then.
  mxt_files_begin_fn begin;
  // Begins a file of a save. NULL (default): nothing can be saved.
  mxt_file_create_fn create;
  // Writes a piece of a file. Must be there where `create` is.
  mxt_file_write_fn write;
  // Ends a save that has succeeded. Must be there where `create` is.
  mxt_files_commit_fn commit;
  // Ends a save that has failed. Must be there where `create` is.
  mxt_files_abort_fn abort;
  // Says why a function failed, or NULL (default): messages have the number that it returned.
  mxt_files_error_fn error;
  // Called with `user_data`, whatever it is, exactly once for each call of
  // mxt_files_from_callbacks that succeeds, when the library will never call the functions above
  // again: at the end of mxt_files_free, or of the call that still uses the files then. A
  // mxt_files_from_callbacks that fails never calls it: user_data is the caller's still. NULL
  // (default): nothing is called.
  mxt_user_data_free_fn user_data_free;
} mxt_file_callbacks;

// What an update did to a tensor. Set struct_size to sizeof(mxt_tensor_update) before the call
// that fills it.
typedef struct mxt_tensor_update {
  // sizeof(mxt_tensor_update), set by the caller.
  size_t struct_size;
  // The step that made it, from 1 on.
  uint64_t step;
  // Norm of the tensor's gradient, before clipping and normalization.
  float grad_norm;
  // How far the gradient is beyond what the second moment has seen coming: root of the mean of
  // g^2 / max(u, epsilon^2) over the tensor's numbers, where g is the gradient that the moments
  // take in and u the corrected second moment after that. 1 while gradients stay as they were,
  // and never above 1 / sqrt(1 - beta2); 2.3 and above in the first layers comes before most
  // spikes of the loss (arXiv 2304.13013). NaN of a tensor that has no second moment, as the
  // matrices of "muon".
  float rms;
} mxt_tensor_update;

// How weights changed over a window of steps, and what they are rounded to in the forward pass.
// Set struct_size to sizeof(mxt_weight_metrics) before the call that fills it.
typedef struct mxt_weight_metrics {
  // sizeof(mxt_weight_metrics), set by the caller.
  size_t struct_size;
  // The last step of the window.
  uint64_t step;
  // Steps of the window.
  uint64_t steps;
  // Mean over the steps of |W - W before| / |W before|, Frobenius norms.
  double change;
  // The same of the rounded weights.
  double rounded_change;
  // Mean over the steps of the share of weights whose codes changed, 0 to 1.
  double flipped;
  // Mean over the weights, after the last step, of their distance from the nearest threshold at
  // which their code changes, over the largest such distance of any weight with that code.
  double confidence;
  // Share of weights whose rounded numbers moved more than 16 times as far as themselves, in the
  // whole window.
  double oscillating;
  // Share of weights above the largest number of their blocks, after the last step.
  double clipped;
  // The largest magnitude of a weight after the last step.
  float amax;
  // Number of tensors that this is of: 1, or all that are watched.
  uint32_t tensors;
} mxt_weight_metrics;

// Sees every step of a run. `eval` is NULL except after a step that was followed by an evaluation,
// and where that failed or was stopped.
// Both structs are borrowed for the call. Returns 0 to go on; any other number ends the run.
//
// Runs on the thread that called mxt_trainer_run, after the step, its evaluation and its
// checkpoint. It may call the library, on this trainer too: save, eval, set_lr, generate, even
// free. A C++ exception passes through mxt_trainer_run, which then saves nothing, and leaves the
// trainer usable; do not longjmp.
typedef int32_t (*mxt_step_fn)(void *user_data,
                               const struct mxt_step_stats *step,
                               const struct mxt_eval_stats *eval);

// What mxt_trainer_run does. Fill it with mxt_run_options_init.
typedef struct mxt_run_options {
  // Set by mxt_run_options_init.
  size_t struct_size;
  // Steps to do in this call. Default 0.
  uint64_t steps;
  // Data to evaluate on, or NULL (default). Borrowed for the call.
  const struct mxt_dataset *eval_dataset;
  // Evaluates whenever the number of steps done is a multiple of it, and after the last step.
  // 0 (default): after the last step only.
  uint64_t eval_every;
  // Most batches of one evaluation. 0 takes all of the dataset. Default 20.
  size_t eval_batches;
  // Folder for the checkpoint, or NULL (default). Borrowed for the call.
  const char *save_dir;
  // Saves whenever the number of steps done is a multiple of it, and at the end of the run,
  // however it ends; there once more where on_step may have changed the trainer or its model
  // since, by any call that needs them for itself.
  // 0 (default): at the end only.
  uint64_t save_every;
  // Sees every step, or NULL (default).
  mxt_step_fn on_step;
  // Passed to on_step.
  void *user_data;
  // Files for the checkpoint in place of save_dir, or NULL (default). Borrowed for the call.
  // They are in use only inside each checkpoint, not while the callback runs, which may free them:
  // the run has them until it ends.
  struct mxt_files *save_files;
} mxt_run_options;

// What a run did. Set struct_size to sizeof(mxt_run_result) before the call that fills it.
typedef struct mxt_run_result {
  // sizeof(mxt_run_result), set by the caller.
  size_t struct_size;
  // Steps done in this call.
  uint64_t steps;
  // Tokens trained on in this call.
  uint64_t tokens;
  // Seconds spent in steps, without evaluations, checkpoints and callbacks.
  double seconds;
  // Loss of the last step, NaN if there was none.
  float last_loss;
  // Loss of the last evaluation that did not fail, NaN if there was none.
  float last_eval_loss;
  // One of mxt_run_end.
  int32_t end;
  // 1 if save_dir or save_files holds the trainer as it is now, else 0.
  int32_t saved;
  // Evaluations of this call that failed. The log has their messages.
  uint64_t eval_errors;
  // Checkpoints of this call that could not be saved. The log has their messages.
  uint64_t save_errors;
} mxt_run_result;

#ifdef __cplusplus
extern "C" {
#endif // __cplusplus

// A short English text for a status code, such as "busy". The text of a code that this library
// does not know is "unknown status". For what went wrong in particular read mxt_last_error.
//
// Never NULL; the text is static. Any thread may call it at any time.
const char *mxt_status_string(mxt_status status);

// The version of the library that is running, such as "0.1.0".
//
// Never NULL; the text is static. Any thread may call it at any time.
const char *mxt_version(void);

// The version of the library that is running; compare with MXT_VERSION_NUMBER, the version of the
// header that the program was compiled with.
//
// Any thread may call it at any time.
uint32_t mxt_version_number(void);

// The binary interface of the library that is running. A program that loads the library at run
// time must not go on if this is not MXT_ABI_VERSION.
//
// Any thread may call it at any time.
uint32_t mxt_abi_version(void);

// What this build is, as a JSON object: "version", "abi", "commit" (null in debug builds and if
// not known), "target", "profile", "devices" (the kinds that it can drive), "recipes", and
// "kernels" with the instruction sets that are "compiled", those that this processor has
// ("available") and the one that an engine takes ("selected"). Later versions may add keys.
//
// Never NULL; the text is static. Any thread may call it at any time.
const char *mxt_build_info(void);

// The message of the last call of this thread that failed: what was expected, what came, and the
// fix where one is known, with the name of the function in front. Every failing call leaves its
// message here; calls with a handle leave it on the handle too (mxt_trainer_last_error and the
// like). Calls that succeed leave it as it is. The empty string when no call has failed yet.
//
// Never NULL; UTF-8; cut off after 1,023 bytes. The text belongs to the calling thread and stays
// valid until that thread's next call that fails, or its end. Any thread may call it at any time.
const char *mxt_last_error(void);

// Fills `group` with the defaults. `struct_size` is sizeof(mxt_group) as the caller's compiler sees
// it.
//
// Errors: MXT_ERROR_NULL, MXT_ERROR_STRUCT_SIZE.
mxt_status mxt_group_init(struct mxt_group *group, size_t struct_size);

// Fills `options` with the defaults. `struct_size` is sizeof(mxt_engine_options) as the caller's
// compiler sees it, so that an older program is not written past the end of its struct.
//
// Errors: MXT_ERROR_NULL, MXT_ERROR_STRUCT_SIZE.
mxt_status mxt_engine_options_init(struct mxt_engine_options *options, size_t struct_size);

// Starts an engine and stores it in `*engine`, for the caller to free with mxt_engine_free.
//
// `options` may be NULL for the defaults, and is not read after the call.
//
// Errors: MXT_ERROR_NULL, MXT_ERROR_STRUCT_SIZE, MXT_ERROR_UTF8, MXT_ERROR_INVALID_ARGUMENT (an
// unknown device, too many threads, a stream of another device), MXT_ERROR_OUT_OF_MEMORY (for the
// threads; use fewer), MXT_ERROR_UNSUPPORTED (threads that the system does not start, a device
// that is not there, or whose driver, NVRTC or cuBLASLt is missing; the message says what to
// install), MXT_ERROR_DEVICE (a GPU that fails); with a group MXT_ERROR_MISMATCH (ranks of other
// versions, seeds or chips) and MXT_ERROR_PEER. The message is in mxt_last_error.
//
// A GPU's kernels are compiled when a chip is met for the first time (some seconds) and kept in
// the user's cache folder: $MXT_CACHE_DIR, else mxfp4train in $XDG_CACHE_HOME or ~/.cache. Only
// absolute names count. A folder that belongs to another user, or that others may write, is not
// used: kernels are compiled every time then, and the log warns.
//
// In the second step of a trainer on a GPU the library captures a CUDA graph, for some
// milliseconds. A call that waits for the whole device then, as cudaDeviceSynchronize does, may
// get an error from CUDA: a host with CUDA code on other threads waits for its streams instead.
// Should a capture be broken off, the step is done without, and the next one tries again.
mxt_status mxt_engine_new(const struct mxt_engine_options *options, struct mxt_engine **engine);

// Stores how much large memory `engine`, and all that was made from it, has in use in `*memory`,
// whose struct_size the caller has set. Any thread may call it at any time.
//
// Errors: MXT_ERROR_NULL, MXT_ERROR_STRUCT_SIZE.
mxt_status mxt_engine_memory(const struct mxt_engine *engine, struct mxt_memory_use *memory);

// The name of the device: "cpu", or "cuda:0" for the first GPU. NULL if `engine` is NULL.
//
// The text is valid as long as the engine. Any thread may call it at any time.
const char *mxt_engine_device(const struct mxt_engine *engine);

// Number of worker threads: those of the CPU, 0 for a GPU. 0 if `engine` is NULL. Any thread may
// call it at any time.
size_t mxt_engine_threads(const struct mxt_engine *engine);

// The seed that models and trainers of this engine start from. 0 if `engine` is NULL. Any thread
// may call it at any time.
uint64_t mxt_engine_seed(const struct mxt_engine *engine);

// Which rank of its group an engine is, from 0 on; 0 without a group, and if `engine` is NULL. Any
// thread may call it at any time.
size_t mxt_engine_rank(const struct mxt_engine *engine);

// Ranks of an engine's group; 1 without one, 0 if `engine` is NULL. Any thread may call it at any
// time.
size_t mxt_engine_ranks(const struct mxt_engine *engine);

// The message of the last call with this engine that failed (making a model from it, for one), on
// whichever thread; the empty string when there is none.
//
// Never NULL. The text belongs to the calling thread and stays valid until that thread's next
// call of mxt_engine_last_error. Any thread may call it at any time.
const char *mxt_engine_last_error(const struct mxt_engine *engine);

// Gives the engine up; NULL does nothing. Models and trainers that were made from it stay usable:
// the worker threads end with the last of them.
void mxt_engine_free(struct mxt_engine *engine);

// Fills `config` with the defaults. `struct_size` is sizeof(mxt_model_config) as the caller's
// compiler sees it.
//
// Errors: MXT_ERROR_NULL, MXT_ERROR_STRUCT_SIZE.
mxt_status mxt_model_config_init(struct mxt_model_config *config, size_t struct_size);

// Makes a model with random initial weights, as GPT-2's, drawn from the engine's seed, and stores it
// in `*model` for the caller to free.
//
// Errors: MXT_ERROR_NULL, MXT_ERROR_STRUCT_SIZE, MXT_ERROR_INVALID_ARGUMENT (names the field),
// MXT_ERROR_OUT_OF_MEMORY. The message is in mxt_last_error and on the engine.
mxt_status mxt_model_new(const struct mxt_engine *engine,
                         const struct mxt_model_config *config,
                         struct mxt_model **model);

// Loads the model of a checkpoint folder, written by this library or by Hugging Face transformers
// (gpt2, llama, mistral, qwen2 or qwen3), and stores it in `*model` for the caller to free. Weights
// are safetensors in 16, 32 or 64 bits, in one file or in several with an index; a head that differs
// from the embedding stays one of its own.
//
// Errors: MXT_ERROR_NULL, MXT_ERROR_INVALID_ARGUMENT, MXT_ERROR_IO,
// MXT_ERROR_FORMAT (a damaged file; names the tensor), MXT_ERROR_MISMATCH, MXT_ERROR_NOT_FINITE (a
// weight in a file), MXT_ERROR_OUT_OF_MEMORY. The message is in mxt_last_error and on the engine.
mxt_status mxt_model_load(const struct mxt_engine *engine,
                          const char *dir,
                          struct mxt_model **model);

// Saves weights and configuration as a folder that Hugging Face transformers opens. The folder is
// made if it is not there. A failure, or a kill at any instant, leaves a whole
// checkpoint there, the one before or the new one. Whatever else is in the folder stays, and so do
// keys of the configuration that a loaded model came with, such as special tokens.
//
// Errors: MXT_ERROR_NULL, MXT_ERROR_INVALID_ARGUMENT, MXT_ERROR_IO, MXT_ERROR_FORMAT (a file, or a
// folder that holds other things and no checkpoint), MXT_ERROR_NOT_FINITE (a weight),
// MXT_ERROR_BUSY.
mxt_status mxt_model_save(const struct mxt_model *model, const char *dir);

// Makes a model with the weights of `model`, which stays as it is, and adapters beside its linear
// layers (LoRA: x A^T B^T, times alpha / rank, is added to a layer's result), and stores it in
// `*adapted` for the caller to free. A trainer of it trains the adapters alone and has gradients and
// states of nothing else. A, "NAME.lora_A.weight" (rank, in), is drawn from the engine's seed; B,
// "NAME.lora_B.weight" (out, rank), is 0, so that it computes what `model` does. `alpha` is 0 for
// twice the rank; `layers` are some of mxt_lora_layer, 0 for all. Both models take memory.
//
// Errors: MXT_ERROR_NULL, MXT_ERROR_INVALID_ARGUMENT (a rank of 0, or a model that has adapters),
// MXT_ERROR_OUT_OF_MEMORY, MXT_ERROR_BUSY.
mxt_status mxt_model_with_lora(const struct mxt_model *model,
                               size_t rank,
                               float alpha,
                               uint32_t layers,
                               struct mxt_model **adapted);

// Makes a model of the weights of `model`, which stays as it is, with its adapters added to them, and
// stores it in `*merged` for the caller to free.
//
// Errors: MXT_ERROR_NULL, MXT_ERROR_INVALID_ARGUMENT (a model without adapters),
// MXT_ERROR_NOT_FINITE (a sum beyond f32), MXT_ERROR_OUT_OF_MEMORY, MXT_ERROR_BUSY.
mxt_status mxt_model_merge_lora(const struct mxt_model *model,
                                struct mxt_model **merged);

// Saves the adapters of a model alone, as a folder that PEFT opens beside the model that they were
// made for: adapter_config.json and adapter_model.safetensors. As atomic as mxt_model_save.
//
// Errors: those of mxt_model_save; MXT_ERROR_INVALID_ARGUMENT also for a model without adapters.
mxt_status mxt_model_save_lora(const struct mxt_model *model, const char *dir);

// mxt_model_with_lora of adapters that PEFT or mxt_model_save_lora saved: LoRA of one rank, without
// DoRA, biases or further modules, the same in all blocks.
//
// Errors: MXT_ERROR_NULL, MXT_ERROR_INVALID_ARGUMENT (a model that has adapters), MXT_ERROR_IO,
// MXT_ERROR_FORMAT (names the key or the tensor), MXT_ERROR_MISMATCH (adapters of another model),
// MXT_ERROR_NOT_FINITE, MXT_ERROR_OUT_OF_MEMORY, MXT_ERROR_BUSY.
mxt_status mxt_model_load_lora(const struct mxt_model *model,
                               const char *dir,
                               struct mxt_model **adapted);

// mxt_model_save of weights that are stored as other numbers, for programs that run the model:
// training that goes on from them begins with what they were rounded to. `weights` is one of
// mxt_stored_weights. In MXFP4 only mxt_model_load reads them, as f32 numbers of which a decoder in
// MXFP4 makes the codes of the file again.
//
// Errors: those of mxt_model_save; MXT_ERROR_INVALID_ARGUMENT also for a number that is beyond the
// format, which it names.
mxt_status mxt_model_save_as(const struct mxt_model *model, const char *dir, int32_t weights);

// Stores the model's shape in `*config`, whose struct_size the caller has set.
//
// Errors: MXT_ERROR_NULL, MXT_ERROR_STRUCT_SIZE.
mxt_status mxt_model_get_config(const struct mxt_model *model, struct mxt_model_config *config);

// Numbers in all tensors, those of adapters among them. 0 if `model` is NULL. Any thread may call it at any time.
uint64_t mxt_model_parameter_count(const struct mxt_model *model);

// Number of tensors. 0 if `model` is NULL. Any thread may call it at any time.
size_t mxt_model_tensor_count(const struct mxt_model *model);

// Stores name and shape of tensor `index` (0 to mxt_model_tensor_count - 1) in `*info`, whose
// struct_size the caller has set.
//
// Errors: MXT_ERROR_NULL, MXT_ERROR_STRUCT_SIZE, MXT_ERROR_INVALID_ARGUMENT (no such index).
mxt_status mxt_model_tensor_info(const struct mxt_model *model,
                                 size_t index,
                                 struct mxt_tensor_info *info);

// Copies tensor `name` into `values`, row-major; or, of one that files have in parts, a part by its
// name there, such as "model.layers.0.self_attn.q_proj.weight". `count` is the number of floats that
// `values` has room for and must be the tensor's element_count, or the part's. `values`
// may lie in memory of the engine's GPU.
//
// Errors: MXT_ERROR_NULL, MXT_ERROR_UTF8, MXT_ERROR_NO_SUCH_TENSOR, MXT_ERROR_INVALID_ARGUMENT (a
// wrong count), MXT_ERROR_BUSY.
mxt_status mxt_model_tensor_read(const struct mxt_model *model,
                                 const char *name,
                                 float *values,
                                 size_t count);

// Overwrites tensor `name`, or a part of one, with `values`, as mxt_model_tensor_read has them.
// `count` is the number of floats in `values` and must be the tensor's element_count, or the part's.
// The moments of a trainer of this model stay as they are.
// `values` may lie in memory of the engine's GPU.
//
// Errors: MXT_ERROR_NULL, MXT_ERROR_UTF8, MXT_ERROR_NO_SUCH_TENSOR, MXT_ERROR_INVALID_ARGUMENT (a
// wrong count), MXT_ERROR_NOT_FINITE, MXT_ERROR_BUSY.
mxt_status mxt_model_tensor_write(struct mxt_model *model,
                                  const char *name,
                                  const float *values,
                                  size_t count);

// The message of the last call with this handle that failed, on whichever thread; the empty string
// when there is none.
//
// Never NULL. The text belongs to the calling thread and stays valid until that thread's next
// call of mxt_model_last_error. Any thread may call it at any time.
const char *mxt_model_last_error(const struct mxt_model *model);

// Gives the handle up; NULL does nothing. Trainers of the model stay usable, and so do other
// handles: the weights go with the last of them.
void mxt_model_free(struct mxt_model *model);

// Fills `options` with the defaults. `struct_size` is sizeof(mxt_generate_options) as the caller's
// compiler sees it.
//
// Errors: MXT_ERROR_NULL, MXT_ERROR_STRUCT_SIZE.
mxt_status mxt_generate_options_init(struct mxt_generate_options *options, size_t struct_size);

// Samples a continuation of the `prompt_count` tokens of `prompt`, at least one. The new tokens
// (without the prompt) go to `tokens`, their number to `*written`.
//
// `options` may be NULL for the defaults. `capacity` is the number of tokens that `tokens` has
// room for, at least max_tokens of the options; with `tokens` NULL and `capacity` 0 the new tokens
// go to on_token only.
//
// Errors: MXT_ERROR_NULL, MXT_ERROR_STRUCT_SIZE, MXT_ERROR_BUFFER_TOO_SMALL,
// MXT_ERROR_INVALID_ARGUMENT (an empty prompt, a negative temperature, a stop token outside the
// vocabulary and the like),
// MXT_ERROR_TOKEN_RANGE, MXT_ERROR_NOT_FINITE, MXT_ERROR_UNSUPPORTED (what the device cannot do),
// MXT_ERROR_OUT_OF_MEMORY, MXT_ERROR_BUSY.
mxt_status mxt_model_generate(struct mxt_model *model,
                              const struct mxt_generate_options *options,
                              const uint32_t *prompt,
                              size_t prompt_count,
                              uint32_t *tokens,
                              size_t capacity,
                              size_t *written);

// Computes the logits of the token after the `token_count` tokens of `tokens`, at least one, in
// f32. Of more tokens than the context holds, the last ones count. `logits` has room for `count`
// numbers, which must be the model's vocab_size. Both arrays may lie in memory of the engine's
// GPU.
//
// Errors: MXT_ERROR_NULL, MXT_ERROR_INVALID_ARGUMENT (no token, another count),
// MXT_ERROR_TOKEN_RANGE, MXT_ERROR_UNSUPPORTED (what the device cannot do),
// MXT_ERROR_OUT_OF_MEMORY, MXT_ERROR_BUSY.
mxt_status mxt_model_next_logits(const struct mxt_model *model,
                                 const uint32_t *tokens,
                                 size_t token_count,
                                 float *logits,
                                 size_t count);

// Writes the log-probability of every token of `text_count` texts, after those before it in its own
// text; that of the first, before which there is none, as 0, so that those of a text add up to that of
// all the rest. Their negative mean is the loss. Nothing but the model is needed, and nothing is kept.
//
// `tokens` are those of all texts, one behind the other, `token_count` in all, and `lengths` how many
// each has: 0 up to the model's context_length. Arrays may be NULL where they have no elements.
// `log_probabilities` has room for token_count numbers. On a processor they are those of each text
// alone, bit for bit. `hidden` is NULL, or has room for token_count times the model's channels: what
// the norm behind the last block puts out at every token, (tokens, channels), from which the head
// makes logits. `weights` is MXT_DECODER_WEIGHTS_F32, on a GPU slow, or MXT_DECODER_WEIGHTS_BF16, which
// a processor computes as the former. Arrays may lie in memory of the engine's GPU, but for `lengths`.
// In a group of ranks the call is a rank's own.
//
// Errors: MXT_ERROR_NULL, MXT_ERROR_INVALID_ARGUMENT (lengths that do not add up to token_count, a
// text beyond the context, other weights), MXT_ERROR_TOKEN_RANGE, MXT_ERROR_UNSUPPORTED (what the
// device cannot do), MXT_ERROR_OUT_OF_MEMORY, MXT_ERROR_BUSY.
mxt_status mxt_model_score(const struct mxt_model *model,
                           int32_t weights,
                           const uint32_t *tokens,
                           size_t token_count,
                           const size_t *lengths,
                           size_t text_count,
                           float *log_probabilities,
                           float *hidden);

// Fills `options` with the defaults. `struct_size` is sizeof(mxt_decoder_options) as the caller's
// compiler sees it.
//
// Errors: MXT_ERROR_NULL, MXT_ERROR_STRUCT_SIZE.
mxt_status mxt_decoder_options_init(struct mxt_decoder_options *options, size_t struct_size);

// Makes a decoder of empty texts of `model` and stores it in `*decoder` for the caller to free. Its
// memory is allocated here: keys and values, 8 bytes a channel, block and token of room (4 where a GPU
// computes in bf16), a copy of the linear layers' weights, in less than f32 of the head's, too (on a
// GPU in MXFP4 alone), one more in MXFP4 with drafts, and what a pass of some hundred tokens takes. On a GPU the driver takes besides
// what a recorded pass of each text does, and where a trainer changes what weights are kept as, all may
// be allocated again. `options` may be NULL for the defaults. The handle `model` stays the caller's,
// and may be freed first.
//
// Errors: MXT_ERROR_NULL, MXT_ERROR_STRUCT_SIZE, MXT_ERROR_INVALID_ARGUMENT (names the option),
// MXT_ERROR_UNSUPPORTED (what the device cannot do), MXT_ERROR_OUT_OF_MEMORY, MXT_ERROR_BUSY. The
// message is in mxt_last_error and on the model.
mxt_status mxt_decoder_new(const struct mxt_model *model,
                           const struct mxt_decoder_options *options,
                           struct mxt_decoder **decoder);

// Appends the `count` tokens of `tokens` to text `sequence`. They are computed when logits are asked
// for. `tokens` may lie in memory of the engine's GPU.
//
// Errors: MXT_ERROR_NULL, MXT_ERROR_INVALID_ARGUMENT (no such sequence, more tokens than there is
// room for), MXT_ERROR_TOKEN_RANGE, MXT_ERROR_BUSY; the text is then as before.
mxt_status mxt_decoder_push(struct mxt_decoder *decoder,
                            size_t sequence,
                            const uint32_t *tokens,
                            size_t count);

// Computes the logits of the token after the last one of text `sequence`, which has at least one.
// `logits` has room for `count` numbers, which must be the model's vocab_size, and may lie in memory
// of the engine's GPU.
//
// In f32 they are those of mxt_model_next_logits of all tokens of the text: on a processor bit for
// bit. In any numbers they are the same bits however the tokens came.
//
// Errors: MXT_ERROR_NULL, MXT_ERROR_INVALID_ARGUMENT (no such sequence, no token, another count),
// MXT_ERROR_OUT_OF_MEMORY (on a GPU, where a trainer has changed what weights are kept as),
// MXT_ERROR_BUSY (also while the model is being trained).
mxt_status mxt_decoder_logits(struct mxt_decoder *decoder,
                              size_t sequence,
                              float *logits,
                              size_t count);

// Computes the logits of what comes after each token of text `sequence` from number `from` on, as
// mxt_decoder_logits has them after each: what it takes to score a text, or to check tokens that were
// guessed. With n such tokens, `logits` has room for `count` numbers, which must be n times the
// model's vocab_size, and may lie in memory of the engine's GPU. All n are computed together, again if
// they were before.
//
// Errors: MXT_ERROR_NULL, MXT_ERROR_INVALID_ARGUMENT (no such sequence or token, another count),
// MXT_ERROR_OUT_OF_MEMORY (on a GPU, where a trainer has changed what weights are kept as),
// MXT_ERROR_BUSY (also while the model is being trained).
mxt_status mxt_decoder_logits_from(struct mxt_decoder *decoder,
                                   size_t sequence,
                                   size_t from,
                                   float *logits,
                                   size_t count);

// Computes the logits of the tokens after the last ones of the `sequence_count` different texts of
// `sequences`, those of mxt_decoder_logits of each. The last tokens of 32 texts at a time share a look
// at the weights; what is missing before them is computed text by text. `logits` has room for `count` numbers, which must be sequence_count times the model's vocab_size, and may lie in
// memory of the engine's GPU.
//
// Errors: MXT_ERROR_NULL, MXT_ERROR_INVALID_ARGUMENT (no such sequence, one that comes twice or has no
// token, another count), MXT_ERROR_OUT_OF_MEMORY, MXT_ERROR_BUSY (also while the model is being
// trained).
mxt_status mxt_decoder_logits_of(struct mxt_decoder *decoder,
                                 const size_t *sequences,
                                 size_t sequence_count,
                                 float *logits,
                                 size_t count);

// mxt_decoder_generate of `sequence_count` different texts at once, which read the weights together.
// The first has the seed of the options, each other one the next; so each is what it would be alone.
// New tokens of text number i of `sequences` are written to `tokens` from number i * `capacity` on,
// where there is room for `capacity` of each, at least max_tokens; their number to number i of
// `written`.
//
// Errors: those of mxt_decoder_generate and mxt_decoder_logits_of; MXT_ERROR_INVALID_ARGUMENT also for
// a draft and for on_token, which would not know whose token it is.
mxt_status mxt_decoder_generate_each(struct mxt_decoder *decoder,
                                     const size_t *sequences,
                                     size_t sequence_count,
                                     const struct mxt_generate_options *options,
                                     uint32_t *tokens,
                                     size_t capacity,
                                     size_t *written);

// Samples a continuation of text `sequence`, which has at least one token, and appends it to the text;
// where there is no more room, the oldest tokens fall out. The new tokens are written to `tokens`,
// which has room for `capacity` of them, at least max_tokens; their number to `*written`. With
// `tokens` NULL and `capacity` 0 they are only given to on_token. `options` may be NULL for the
// defaults; its weights are not looked at, for the decoder has its own. Draws are numbered from 0 in
// every call, so a text that is continued again wants another seed.
//
// Errors: MXT_ERROR_NULL, MXT_ERROR_STRUCT_SIZE, MXT_ERROR_INVALID_ARGUMENT (no such sequence, no
// token, an option out of range, a draft in MXFP4 without drafts in the decoder's options),
// MXT_ERROR_BUFFER_TOO_SMALL, MXT_ERROR_NOT_FINITE (the logits), MXT_ERROR_OUT_OF_MEMORY,
// MXT_ERROR_BUSY. After MXT_ERROR_NOT_FINITE and MXT_ERROR_OUT_OF_MEMORY the text may have new tokens
// (mxt_decoder_tokens).
mxt_status mxt_decoder_generate(struct mxt_decoder *decoder,
                                size_t sequence,
                                const struct mxt_generate_options *options,
                                uint32_t *tokens,
                                size_t capacity,
                                size_t *written);

// Takes the tokens of text `sequence` from number `len` on out again; others can follow. 0 empties
// it.
//
// Errors: MXT_ERROR_NULL, MXT_ERROR_INVALID_ARGUMENT (no such sequence, one with fewer tokens),
// MXT_ERROR_BUSY.
mxt_status mxt_decoder_rewind(struct mxt_decoder *decoder, size_t sequence, size_t len);

// Makes text `to` that of sequence `from`, with what is computed of it, so that both can go on in
// their own ways.
//
// Errors: MXT_ERROR_NULL, MXT_ERROR_INVALID_ARGUMENT (no such sequence), MXT_ERROR_BUSY.
mxt_status mxt_decoder_fork(struct mxt_decoder *decoder, size_t from, size_t to);

// Copies the tokens of text `sequence` into `tokens`, which has room for `capacity` of them, and
// stores their number in `*written`. With `tokens` NULL and `capacity` 0 their number alone.
//
// Errors: MXT_ERROR_NULL, MXT_ERROR_INVALID_ARGUMENT (no such sequence), MXT_ERROR_BUFFER_TOO_SMALL,
// MXT_ERROR_BUSY.
mxt_status mxt_decoder_tokens(struct mxt_decoder *decoder,
                              size_t sequence,
                              uint32_t *tokens,
                              size_t capacity,
                              size_t *written);

// The message of the last call with this handle that failed, on whichever thread; the empty string
// when there is none.
//
// Never NULL. The text belongs to the calling thread and stays valid until that thread's next
// call of mxt_decoder_last_error. Any thread may call it at any time.
const char *mxt_decoder_last_error(const struct mxt_decoder *decoder);

// Gives the handle up; NULL does nothing. Its memory goes with it, and the model stays.
void mxt_decoder_free(struct mxt_decoder *decoder);

// Fills `options` with the defaults. `struct_size` is sizeof(mxt_dataset_options) as the caller's
// compiler sees it.
//
// Errors: MXT_ERROR_NULL, MXT_ERROR_STRUCT_SIZE.
mxt_status mxt_dataset_options_init(struct mxt_dataset_options *options, size_t struct_size);

// Opens a token file, or all files that a pattern such as "data/train_*.bin" matches, in the order
// of their names, and stores the dataset in `*dataset` for the caller to free. `*` and `?` match
// within a name, `**` any number of folders; a path that exists is taken as it is.
//
// Each file may be raw little-endian tokens of 16 bits, or of 32 or 64 where that is beyond doubt;
// llm.c's format with its header; NumPy's .npy of uint8, uint16, uint32, int32 or int64, of one
// dimension, or of two, read row by row; or Megatron's pair of .bin and .idx, of which either file
// can be named, and which counts once where both match. Documents are not told apart, and windows
// do not cross files. Links are followed, and a file that is found again through one counts once.
//
// Files are mapped, not read, and none keeps a descriptor open. A file may be replaced by renaming
// another over it, which changes nothing for the dataset; tokens that are written to it are
// checked like all others. There may be any number of files; those beyond 16,384 are opened for
// every read, and so must keep their names.
//
// Errors: MXT_ERROR_NULL, MXT_ERROR_INVALID_ARGUMENT (a pattern that matches nothing),
// MXT_ERROR_IO, MXT_ERROR_FORMAT (a damaged file, or one of another kind, which the message names
// with the remedy), MXT_ERROR_OUT_OF_MEMORY. The message is in mxt_last_error.
mxt_status mxt_dataset_open(const char *pattern, struct mxt_dataset **dataset);

// Does what mxt_dataset_open does, with options. `options` may be NULL for the defaults.
//
// Errors: those of mxt_dataset_open, MXT_ERROR_STRUCT_SIZE, and MXT_ERROR_INVALID_ARGUMENT for an
// option, which the message names.
mxt_status mxt_dataset_open_with(const char *pattern,
                                 const struct mxt_dataset_options *options,
                                 struct mxt_dataset **dataset);

// Opens `count` token files as one dataset, in the order given, and stores it in `*dataset` for
// the caller to free. `paths` and its strings are borrowed for the call.
//
// Errors: MXT_ERROR_NULL, MXT_ERROR_INVALID_ARGUMENT (no files), MXT_ERROR_IO, MXT_ERROR_FORMAT,
// MXT_ERROR_OUT_OF_MEMORY. The message is in mxt_last_error.
mxt_status mxt_dataset_open_files(const char *const *paths,
                                  size_t count,
                                  struct mxt_dataset **dataset);

// Does what mxt_dataset_open_files does, with options. `options` may be NULL for the defaults.
//
// Errors: those of mxt_dataset_open_files, MXT_ERROR_STRUCT_SIZE, and MXT_ERROR_INVALID_ARGUMENT
// for an option, which the message names.
mxt_status mxt_dataset_open_files_with(const char *const *paths,
                                       size_t count,
                                       const struct mxt_dataset_options *options,
                                       struct mxt_dataset **dataset);

// Makes a dataset from `count` tokens in memory, which are copied, and stores it in `*dataset` for
// the caller to free.
//
// Errors: MXT_ERROR_NULL, MXT_ERROR_INVALID_ARGUMENT, MXT_ERROR_OUT_OF_MEMORY. The message is in
// mxt_last_error.
mxt_status mxt_dataset_from_tokens(const uint32_t *tokens,
                                   size_t count,
                                   struct mxt_dataset **dataset);

// Makes a dataset from `count` tokens in memory of the host's, which are not copied, and stores it in
// `*dataset` for the caller to free. `token_type` is MXT_TOKEN_TYPE_U16 or MXT_TOKEN_TYPE_U32. The
// tokens have to stay there, unchanged, until `user_data_free` is called with `user_data`: once, when
// mxt_dataset_free has been called and no other call uses the dataset any more, on the thread that
// ends it. `user_data_free` may be NULL.
//
// Errors: MXT_ERROR_NULL, MXT_ERROR_INVALID_ARGUMENT, MXT_ERROR_OUT_OF_MEMORY: the user data stay the
// caller's then. The message is in mxt_last_error.
mxt_status mxt_dataset_from_memory(const void *tokens,
                                   size_t count,
                                   int32_t token_type,
                                   void *user_data,
                                   mxt_user_data_free_fn user_data_free,
                                   struct mxt_dataset **dataset);

// Makes a dataset of `count` windows that the host fills, numbered from 0, each time that one is
// wanted, and stores it in `*dataset` for the caller to free. Training asks for all of them once
// in an epoch, in an order that the engine's seed gives, an evaluation for some spread evenly, in
// their order. A loss is the weighted sum over the sum of weights of its step or evaluation; a
// step whose weights are all 0 has a loss of 0 and no gradient, such an evaluation is
// MXT_ERROR_INVALID_ARGUMENT. The tokens of an evaluation are the targets whose weight is not 0.
// Ranks of a group compare the number of windows, and not what is in them. Functions that read
// tokens of a dataset return MXT_ERROR_UNSUPPORTED.
//
// `user_data` is passed to `fill`, and to `user_data_free` (which may be NULL) as for
// mxt_dataset_from_memory.
//
// Errors: MXT_ERROR_NULL, MXT_ERROR_INVALID_ARGUMENT (a count of 0): the user data stay the caller's
// then. The message is in mxt_last_error.
mxt_status mxt_dataset_from_windows(uint64_t count,
                                    mxt_window_fn fill,
                                    void *user_data,
                                    mxt_user_data_free_fn user_data_free,
                                    struct mxt_dataset **dataset);

// mxt_dataset_from_windows of windows that are packed with documents, which are kept apart as those
// of mxt_batch are: where the number changes along a window another document begins. A window whose
// numbers are all the same is cut at document_end of the trainer's options, where there is one. The
// last input of a document has the first of the next as its target: its weight is to be 0 where that
// is not to be learned.
//
// Errors: as mxt_dataset_from_windows.
mxt_status mxt_dataset_from_packed_windows(uint64_t count,
                                           mxt_packed_window_fn fill,
                                           void *user_data,
                                           mxt_user_data_free_fn user_data_free,
                                           struct mxt_dataset **dataset);

// Number of tokens in all files; 0 where the host fills windows, and if `dataset` is NULL. Any thread
// may call it at any time.
uint64_t mxt_dataset_token_count(const struct mxt_dataset *dataset);

// Stores the largest token in `*token`: a model needs a vocab_size above it. Reads all files,
// unless that has been done.
//
// Any thread may call it at any time. Errors: MXT_ERROR_NULL, MXT_ERROR_IO, MXT_ERROR_TOKEN_RANGE
// (a number below 0 or above 32 bits, which is no token).
mxt_status mxt_dataset_max_token(const struct mxt_dataset *dataset, uint32_t *token);

// Counts what training with sequences of `sequence_length` tokens reads of the dataset, and stores
// it in `*coverage` (struct_size set by the caller). Files without a whole window, of a sequence
// and one more token, are never read; a trainer's first step with such a dataset says so in the
// engine's log, unless this function was called with the trainer's length before.
//
// Any thread may call it at any time. Errors: MXT_ERROR_NULL, MXT_ERROR_STRUCT_SIZE.
mxt_status mxt_dataset_coverage(const struct mxt_dataset *dataset,
                                size_t sequence_length,
                                struct mxt_coverage *coverage);

// Copies `count` tokens, from number `first` on, to `tokens`, which has room for so many. Tokens
// are counted from 0 over all files in their order. `tokens` may be NULL where `count` is 0.
//
// Any thread may call it at any time. Errors: MXT_ERROR_NULL, MXT_ERROR_INVALID_ARGUMENT (the
// dataset ends before `first` + `count`), MXT_ERROR_IO, MXT_ERROR_TOKEN_RANGE (a number below 0 or
// above 32 bits, which is no token).
mxt_status mxt_dataset_read(const struct mxt_dataset *dataset,
                            uint64_t first,
                            size_t count,
                            uint32_t *tokens);

// The message of the last call with this dataset as its first argument that failed; the empty
// string when there is none. What goes wrong while a trainer reads it is on the trainer.
//
// Never NULL. The text belongs to the calling thread and stays valid until that thread's next
// call of mxt_dataset_last_error. Any thread may call it at any time.
const char *mxt_dataset_last_error(const struct mxt_dataset *dataset);

// Gives the dataset up; NULL does nothing. Files are unmapped when no call uses it any more.
void mxt_dataset_free(struct mxt_dataset *dataset);

// Fills `options` with the defaults. `struct_size` is sizeof(mxt_trainer_options) as the caller's
// compiler sees it.
//
// Errors: MXT_ERROR_NULL, MXT_ERROR_STRUCT_SIZE.
mxt_status mxt_trainer_options_init(struct mxt_trainer_options *options, size_t struct_size);

// Makes a trainer at step 0 of `model` and stores it in `*trainer` for the caller to free. All
// memory of training is allocated here; see mxt_plan. `options` may be NULL for the defaults.
//
// The trainer changes the weights of `model`. The handle `model` stays the caller's.
//
// Errors: MXT_ERROR_NULL, MXT_ERROR_STRUCT_SIZE, MXT_ERROR_UTF8, MXT_ERROR_INVALID_ARGUMENT (names
// the option), MXT_ERROR_OUT_OF_MEMORY, MXT_ERROR_UNSUPPORTED, MXT_ERROR_BUSY. The message is in
// mxt_last_error and on the model.
mxt_status mxt_trainer_new(struct mxt_model *model,
                           const struct mxt_trainer_options *options,
                           struct mxt_trainer **trainer);

// Loads what mxt_trainer_save wrote, model, moments, options and position, and stores the trainer
// in `*trainer` for the caller to free. The next steps are the same, bit for bit, as if the run
// had never stopped. The number of threads may differ; the seed is the checkpoint's.
//
// Errors: MXT_ERROR_NULL, MXT_ERROR_INVALID_ARGUMENT, MXT_ERROR_IO, MXT_ERROR_FORMAT (a damaged
// file; names the tensor), MXT_ERROR_MISMATCH, MXT_ERROR_NOT_FINITE (a number in a file),
// MXT_ERROR_UNSUPPORTED (what the device cannot do), MXT_ERROR_OUT_OF_MEMORY. The message is in
// mxt_last_error and on the engine.
mxt_status mxt_trainer_load(const struct mxt_engine *engine,
                            const char *dir,
                            struct mxt_trainer **trainer);

// mxt_trainer_load, with moments, weights and gradients that are kept from here on in what
// `optimizer` says, such as "adamw,moments=int8": they are rounded to it once, and the run goes on
// as one that was made so. The optimizer itself must be the saved one; other switches need not be
// named again, and cannot be changed. `optimizer` is borrowed for the call.
//
// Errors: as mxt_trainer_load; MXT_ERROR_INVALID_ARGUMENT for another optimizer, too.
mxt_status mxt_trainer_load_as(const struct mxt_engine *engine,
                               const char *dir,
                               const char *optimizer,
                               struct mxt_trainer **trainer);

// Saves model, moments, options and position to the folder `dir`, which is made if it is not
// there. A failure, or a kill at any instant, leaves a whole checkpoint there, the one before or
// the new one. Whatever else is in the folder stays. Hugging Face transformers opens the folder as
// gpt2.
//
// Errors: MXT_ERROR_NULL, MXT_ERROR_INVALID_ARGUMENT, MXT_ERROR_IO, MXT_ERROR_FORMAT (a file, or a
// folder that holds other things and no checkpoint), MXT_ERROR_NOT_FINITE (a weight or a moment),
// MXT_ERROR_BUSY.
mxt_status mxt_trainer_save(struct mxt_trainer *trainer, const char *dir);

// Does one optimizer step on the next windows of `dataset` and stores what it did in `*stats`
// (struct_size set by the caller; NULL if not wanted). A stop request does not concern it, as it does
// mxt_trainer_step_unless_stopped.
//
// Errors: MXT_ERROR_NULL, MXT_ERROR_STRUCT_SIZE, MXT_ERROR_INVALID_ARGUMENT (a dataset shorter
// than a sequence; batches that wait for mxt_trainer_update), MXT_ERROR_TOKEN_RANGE (a token outside
// of the vocabulary anywhere in the dataset, also where this step does not read it), MXT_ERROR_IO (a
// file of the dataset has become shorter, or its disk fails), MXT_ERROR_NOT_FINITE (loss or gradient
// are not, or a weight or moment would not be), MXT_ERROR_BUSY. Whatever the error, weights and
// moments are as before the step.
mxt_status mxt_trainer_step(struct mxt_trainer *trainer,
                            const struct mxt_dataset *dataset,
                            struct mxt_step_stats *stats);

// mxt_trainer_step, given up where a stop is asked for (mxt_trainer_request_stop, from any thread
// or signal handler, or a callback that fills windows): it is seen before each batch of the step.
// The next step then does the same from its beginning. The request stands until
// mxt_trainer_clear_stop.
//
// Errors: as mxt_trainer_step, and MXT_STOPPED: weights and moments are as before the step.
mxt_status mxt_trainer_step_unless_stopped(struct mxt_trainer *trainer,
                                           const struct mxt_dataset *dataset,
                                           struct mxt_step_stats *stats);

// Does one optimizer step on the caller's own tokens and stores what it did in `*stats`
// (struct_size set by the caller; NULL if not wanted).
//
// `tokens` holds accumulation * batch_size rows of sequence_length + 1 tokens, row after row (of N
// ranks each brings those of its own batches: accumulation / N, from rank * accumulation / N on), and
// `count` is their number. Position t of a row learns to predict position t + 1. `tokens` may lie
// in memory of the engine's GPU, written before the call or on the engine's stream.
//
// Errors: MXT_ERROR_NULL, MXT_ERROR_STRUCT_SIZE, MXT_ERROR_INVALID_ARGUMENT (a wrong count; an
// optimizer with "ramping", which draws windows of its own; batches that wait for
// mxt_trainer_update), MXT_ERROR_TOKEN_RANGE, MXT_ERROR_NOT_FINITE (the weights are as before the
// step), MXT_ERROR_BUSY.
mxt_status mxt_trainer_step_tokens(struct mxt_trainer *trainer,
                                   const uint32_t *tokens,
                                   size_t count,
                                   struct mxt_step_stats *stats);

// Computes the mean loss over at most `max_batches` batches spread evenly over `dataset`, the same
// ones in every call, and stores it in `*stats` (struct_size set by the caller). 0 takes all of
// the dataset. Changes nothing of the run. A loss that is NaN or infinite is a result, not an
// error.
//
// A recipe with "haste" merges the channels that linear layers read, and `*stats` says what that
// would spare.
//
// Where no file has the tokens of a sequence and one more, each file of two tokens or more is one
// shorter sequence of all its tokens; stats->tokens tells how many were predicted.
//
// A stop request is seen before each batch; it stays for mxt_trainer_run, which may have called
// back the caller.
//
// Errors: MXT_ERROR_NULL, MXT_ERROR_STRUCT_SIZE, MXT_ERROR_INVALID_ARGUMENT (no file of two
// tokens), MXT_ERROR_TOKEN_RANGE (anywhere in the dataset), MXT_ERROR_IO, MXT_ERROR_BUSY,
// MXT_STOPPED.
mxt_status mxt_trainer_eval(struct mxt_trainer *trainer,
                            const struct mxt_dataset *dataset,
                            size_t max_batches,
                            struct mxt_eval_stats *stats);

// Asks evaluations from here on, those of mxt_trainer_run too, how sharp the loss is in the
// logits: how much it could rise if each logit y moved by up to `epsilon` (|y| + 1), from above 0
// to 1 (1e-3 is usual); 0 ends it. The loss itself stays the same, bit for bit. It takes 20 bytes
// for each token of a batch, and is not saved with the run.
//
// Errors: MXT_ERROR_NULL, MXT_ERROR_INVALID_ARGUMENT (another number), MXT_ERROR_OUT_OF_MEMORY,
// MXT_ERROR_BUSY.
mxt_status mxt_trainer_set_sharpness(struct mxt_trainer *trainer, float epsilon);

// Takes `lr` as the learning rate from the next step on, in place of the schedule's. It is saved
// with the run; mxt_trainer_use_schedule takes it back.
//
// Errors: MXT_ERROR_NULL, MXT_ERROR_INVALID_ARGUMENT (negative or not finite), MXT_ERROR_BUSY.
mxt_status mxt_trainer_set_lr(struct mxt_trainer *trainer, float lr);

// Takes a new schedule from the next step on: `schedule`, `lr`, `min_lr`, `warmup_steps`,
// `total_steps` and `decay_steps` of `options`; nothing else of it is read. Its steps are counted
// from here: it begins with its warm-up and ends total_steps steps later. A rate that
// mxt_trainer_set_lr set is dropped. The schedule, and where it began, are saved with the run.
//
// Errors: MXT_ERROR_NULL, MXT_ERROR_STRUCT_SIZE, MXT_ERROR_INVALID_ARGUMENT (names the field; the
// present schedule stays), MXT_ERROR_BUSY.
mxt_status mxt_trainer_set_schedule(struct mxt_trainer *trainer,
                                    const struct mxt_trainer_options *options);

// Returns to the schedule's learning rate after mxt_trainer_set_lr.
//
// Errors: MXT_ERROR_NULL, MXT_ERROR_BUSY.
mxt_status mxt_trainer_use_schedule(struct mxt_trainer *trainer);

// The step that the schedule counts from: 0, or the number of steps that were done when
// mxt_trainer_set_schedule set it. 0 if `trainer` is NULL. Any thread may call it at any time,
// also while a step is running.
uint64_t mxt_trainer_schedule_start(const struct mxt_trainer *trainer);

// Number of optimizer steps done since step 0, those before a save and load included. 0 if
// `trainer` is NULL. Any thread may call it at any time, also while a step is running.
uint64_t mxt_trainer_steps_done(const struct mxt_trainer *trainer);

// Stores a new handle on the trainer's model in `*model`, for the caller to free. It is the same
// model: the next step changes what the handle reads.
//
// Any thread may call it at any time. Errors: MXT_ERROR_NULL.
mxt_status mxt_trainer_model(const struct mxt_trainer *trainer, struct mxt_model **model);

// Stores the options that the trainer was made from, or loaded with, and the schedule last set, in
// `*options` (struct_size set by the caller). Its texts are valid as long as the trainer.
//
// Any thread may call it at any time. Errors: MXT_ERROR_NULL, MXT_ERROR_STRUCT_SIZE.
mxt_status mxt_trainer_get_options(const struct mxt_trainer *trainer,
                                   struct mxt_trainer_options *options);

// Asks mxt_trainer_run to stop: before its next step, or before the next batch of a step of
// several batches or of an evaluation, which then count as not done. A run that is not started yet
// stops at once. mxt_trainer_eval stops with MXT_STOPPED. The request stands until a run uses it
// up, and with it all that come before that run has returned, or mxt_trainer_clear_stop takes it
// back. NULL does nothing.
//
// Any thread and any signal handler may call it at any time: it is one atomic store. The handle
// must not be freed meanwhile.
void mxt_trainer_request_stop(const struct mxt_trainer *trainer);

// Takes a stop request back that no run has used up. NULL does nothing.
//
// Any thread and any signal handler may call it at any time, as mxt_trainer_request_stop.
void mxt_trainer_clear_stop(const struct mxt_trainer *trainer);

// The message of the last call with this trainer that failed, on whichever thread; the empty
// string when there is none.
//
// Never NULL. The text belongs to the calling thread and stays valid until that thread's next
// call of mxt_trainer_last_error. Any thread may call it at any time.
const char *mxt_trainer_last_error(const struct mxt_trainer *trainer);

// Gives the trainer up; NULL does nothing. Nothing is saved. Its model stays usable through other
// handles. A callback may free the trainer that called it: the run then stops before its next
// step.
void mxt_trainer_free(struct mxt_trainer *trainer);

// Computes the bytes that a model of this shape with its trainer will take, before anything is
// allocated, and stores them in `*result` (struct_size set by the caller). `options` may be NULL
// for the defaults. The engine's memory limit does not concern it.
//
// Errors: MXT_ERROR_NULL, MXT_ERROR_STRUCT_SIZE, MXT_ERROR_UTF8, MXT_ERROR_INVALID_ARGUMENT,
// MXT_ERROR_UNSUPPORTED (what the device cannot do).
mxt_status mxt_plan(const struct mxt_engine *engine,
                    const struct mxt_model_config *config,
                    const struct mxt_trainer_options *options,
                    struct mxt_memory_plan *result);

// Fills `batch` with the defaults. `struct_size` is sizeof(mxt_batch) as the caller's header has it.
//
// Errors: MXT_ERROR_NULL, MXT_ERROR_STRUCT_SIZE.
mxt_status mxt_batch_init(struct mxt_batch *batch,
                          size_t struct_size);

// Computes the gradients of a batch, and adds them to those of the batches since the last update:
// of the sum of all weighted losses over the sum of divisors. mxt_trainer_update makes the step of
// them. Where `accumulation` such batches have no weights but 1, that step has the bits of
// mxt_trainer_step_tokens; any other number of batches is as good, but where the trainer has
// lanes, or is in a group of ranks, of which each gives its accumulation / ranks; or keeps
// gradients in bf16, which take one.
//
// It is not collective. mxt_trainer_step and its like return MXT_ERROR_INVALID_ARGUMENT while batches
// wait for an update; evaluating and saving go on, and a checkpoint does not have them.
//
// Errors: MXT_ERROR_NULL, MXT_ERROR_STRUCT_SIZE, MXT_ERROR_INVALID_ARGUMENT (another `count`; more
// batches than a step has; gradients that were written or scaled; an optimizer with "ramping";
// documents with a token_drop or "haste"),
// MXT_ERROR_TOKEN_RANGE, MXT_ERROR_NOT_FINITE (a weight), MXT_ERROR_BUSY: the batches before still
// wait then. MXT_STOPPED (`loss` returned another number than 0): none of them does any more, and
// the step begins anew.
mxt_status mxt_trainer_forward_backward(struct mxt_trainer *trainer,
                                        const struct mxt_batch *batch);

// Computes the loss of a batch, without gradients, and stores it in `*stats` (struct_size set by
// the caller): the sum of its weighted losses over its divisor; the tokens are the targets whose
// weight is not 0. Like mxt_trainer_eval it changes nothing of the run, batches that wait for an
// update included, and a loss that is NaN or infinite is a result, not an error. What a `loss` of
// the batch writes for gradients is dropped. It is not collective.
//
// Errors: MXT_ERROR_NULL, MXT_ERROR_STRUCT_SIZE, MXT_ERROR_INVALID_ARGUMENT (another `count`; a
// divisor that is not above 0, as where every target is ignored), MXT_ERROR_TOKEN_RANGE,
// MXT_ERROR_NOT_FINITE (a weight), MXT_STOPPED (`loss` returned another number than 0),
// MXT_ERROR_BUSY.
mxt_status mxt_trainer_forward(struct mxt_trainer *trainer,
                               const struct mxt_batch *batch,
                               struct mxt_eval_stats *stats);

// One optimizer step by the gradients of all batches since the last one
// (mxt_trainer_forward_backward) and stores what it did in `*stats` (struct_size set by the
// caller; NULL if not wanted): clips, and moves the weights. Collective in a group of ranks.
//
// Errors: MXT_ERROR_NULL, MXT_ERROR_STRUCT_SIZE, MXT_ERROR_INVALID_ARGUMENT (no batch waits, or
// too few with lanes; or the divisors of all of them are not above 0 together, as where every
// target is ignored, or beyond 1e-20 or 1e20 a position), MXT_ERROR_NOT_FINITE, MXT_ERROR_BUSY.
// Weights and moments are then as before. Batches still wait where there are too few, here or on
// another rank, and where ranks ask for different things; after any other error none does.
mxt_status mxt_trainer_update(struct mxt_trainer *trainer, struct mxt_step_stats *stats);

// Drops the gradients that wait for an update; the next batch begins a step anew.
//
// Errors: MXT_ERROR_NULL, MXT_ERROR_BUSY.
mxt_status mxt_trainer_zero_gradients(struct mxt_trainer *trainer);

// Multiplies the gradient that waits for an update by `factor`, of the tensor of this name or, where
// `tensor` is NULL, of all. No batch can be added then. `tensor` is borrowed for the call.
//
// Errors: MXT_ERROR_NULL, MXT_ERROR_UTF8, MXT_ERROR_NO_SUCH_TENSOR, MXT_ERROR_INVALID_ARGUMENT (a
// factor that is not finite; no gradient waits), MXT_ERROR_UNSUPPORTED (with lanes, or in a group),
// MXT_ERROR_BUSY.
mxt_status mxt_trainer_scale_gradients(struct mxt_trainer *trainer,
                                       const char *tensor,
                                       float factor);

// Stores 1 in `*is_trained` where a tensor is trained, so that it has a gradient, and 0 where it is
// frozen or beside adapters.
//
// Errors: MXT_ERROR_NULL, MXT_ERROR_UTF8, MXT_ERROR_NO_SUCH_TENSOR, MXT_ERROR_BUSY.
mxt_status mxt_trainer_is_trained(struct mxt_trainer *trainer,
                                  const char *tensor,
                                  int32_t *is_trained);

// Copies the gradient of a tensor to `values`, which has room for `count` numbers, in the shape
// that mxt_model_tensor_info gives: of the last step, before clipping; or, where batches wait for
// an update, of their loss so far (of this rank, and of its last lane). Gradients that were
// dropped, by mxt_trainer_zero_gradients or an error, are not read. `values` may lie on the
// engine's GPU.
//
// Errors: MXT_ERROR_NULL, MXT_ERROR_UTF8, MXT_ERROR_NO_SUCH_TENSOR, MXT_ERROR_INVALID_ARGUMENT
// (another count; dropped gradients; the divisors of the batches are not above 0 together),
// MXT_ERROR_UNSUPPORTED (a tensor of which another rank has the gradient), MXT_ERROR_BUSY.
mxt_status mxt_trainer_read_gradient(struct mxt_trainer *trainer,
                                     const char *tensor,
                                     float *values,
                                     size_t count);

// Overwrites the gradient of a tensor that waits for an update, in the shape that
// mxt_model_tensor_info gives; mxt_trainer_read_gradient then reads the same. Where none waits,
// those of all other tensors are 0: a host may bring all gradients itself. No batch can be added
// then. `values` may lie on the engine's GPU.
//
// Errors: MXT_ERROR_NULL, MXT_ERROR_UTF8, MXT_ERROR_NO_SUCH_TENSOR, MXT_ERROR_INVALID_ARGUMENT (as
// for mxt_trainer_read_gradient), MXT_ERROR_NOT_FINITE, MXT_ERROR_UNSUPPORTED (with lanes, or in a
// group), MXT_ERROR_OUT_OF_MEMORY, MXT_ERROR_BUSY.
mxt_status mxt_trainer_write_gradient(struct mxt_trainer *trainer,
                                      const char *tensor,
                                      const float *values,
                                      size_t count);

// Copies all that mxt_trainer_save would write to the host, and stores the copy in `*snapshot` for the
// caller to free. It takes as much memory as the two tensor files of a checkpoint together. The
// trainer may be freed before it. Not collective, but with shard_states of mxt_group: then all ranks
// make it, and that of rank 0 has all that there is to save.
//
// Errors: MXT_ERROR_NULL, MXT_ERROR_OUT_OF_MEMORY (also where the host has less memory free),
// MXT_ERROR_DEVICE, MXT_ERROR_BUSY, MXT_ERROR_MISMATCH, MXT_ERROR_PEER. The message is in mxt_last_error and on the
// trainer.
mxt_status mxt_trainer_snapshot(struct mxt_trainer *trainer,
                                struct mxt_snapshot **snapshot);

// Copies `trainer` as it is now into a snapshot that was made before, of this trainer or another, in
// place of what it held: its memory is used again, which is faster than new memory, and kept where
// less is needed.
//
// Errors: MXT_ERROR_NULL, MXT_ERROR_OUT_OF_MEMORY, after which the snapshot may hold nothing,
// MXT_ERROR_DEVICE, after which neither can be used, MXT_ERROR_BUSY (another call is inside one of
// them: the snapshot is then as it was). Where it is collective (mxt_group's shard_states),
// MXT_ERROR_MISMATCH and MXT_ERROR_PEER, after which it is as it was, unless a rank is lost while
// others bring what they have: then it holds nothing. The message is in mxt_last_error and on the snapshot.
mxt_status mxt_snapshot_renew(struct mxt_snapshot *snapshot,
                              struct mxt_trainer *trainer);

// Saves what the trainer was to the folder `dir`, as mxt_trainer_save would have done then. Any thread
// may call it, also while the trainer is in a step.
//
// Errors: those of mxt_trainer_save; MXT_ERROR_INVALID_ARGUMENT behind a mxt_snapshot_renew that
// failed, and where another rank than 0 has only a part (mxt_group's shard_states).
mxt_status mxt_snapshot_save(struct mxt_snapshot *snapshot,
                             const char *dir);

// The message of the last call with this handle that failed, on whichever thread; the empty string
// when there is none.
//
// Never NULL. The text belongs to the calling thread and stays valid until that thread's next
// call of mxt_snapshot_last_error. Any thread may call it at any time.
const char *mxt_snapshot_last_error(const struct mxt_snapshot *snapshot);

// Gives the handle up, and its memory; NULL does nothing.
void mxt_snapshot_free(struct mxt_snapshot *snapshot);

// Fills `callbacks` with the defaults. `struct_size` is sizeof(mxt_file_callbacks) as the caller's
// compiler sees it.
//
// Errors: MXT_ERROR_NULL, MXT_ERROR_STRUCT_SIZE.
mxt_status mxt_file_callbacks_init(struct mxt_file_callbacks *callbacks, size_t struct_size);

// Makes files that the host reads and writes, and stores them in `*files` for the caller to free.
// `callbacks` is not read after the call.
//
// Errors: MXT_ERROR_NULL (also for functions that must be there), MXT_ERROR_STRUCT_SIZE. The
// message is in mxt_last_error.
mxt_status mxt_files_from_callbacks(const struct mxt_file_callbacks *callbacks,
                                    struct mxt_files **files);

// Makes a set of files in memory, of which there are none yet, and stores it in `*files` for the
// caller to free.
//
// Errors: MXT_ERROR_NULL. The message is in mxt_last_error.
mxt_status mxt_files_in_memory(struct mxt_files **files);

// Number of files in memory. 0 for files of the host's own, while another call changes them, and
// if `files` is NULL.
size_t mxt_files_count(const struct mxt_files *files);

// The name of file `index` in memory (0 to mxt_files_count - 1), in the order of their bytes; NULL
// where there is no such file, and if `files` is NULL. The text is valid until the files change or
// are freed.
const char *mxt_files_name(const struct mxt_files *files, size_t index);

// Stores in `*bytes` where the bytes of a file in memory lie, and in `*count` how many there are.
// They are valid, to be read, until the files change or are freed.
//
// Errors: MXT_ERROR_NULL, MXT_ERROR_UTF8, MXT_ERROR_INVALID_ARGUMENT (no file of this name, or
// files of the host's own), MXT_ERROR_BUSY.
mxt_status mxt_files_view(const struct mxt_files *files,
                          const char *name,
                          const void **bytes,
                          size_t *count);

// Puts a copy of `count` bytes into memory as the file `name`, in place of one of the same name.
//
// Errors: MXT_ERROR_NULL, MXT_ERROR_UTF8, MXT_ERROR_INVALID_ARGUMENT (an empty name, files of the
// host's own), MXT_ERROR_OUT_OF_MEMORY, MXT_ERROR_BUSY; the files are then as before.
mxt_status mxt_files_put(struct mxt_files *files,
                         const char *name,
                         const void *bytes,
                         size_t count);

// mxt_files_put without a copy, of bytes that lie in the host's memory, such as a map of a file:
// they have to stay there, unchanged, until `user_data_free` is called with `user_data`: once,
// when the file is replaced or removed or the files are freed. `user_data_free` may be NULL; calls
// on the files from it return MXT_ERROR_BUSY.
//
// Errors: those of mxt_files_put; the user data stay the caller's then.
mxt_status mxt_files_lend(struct mxt_files *files,
                          const char *name,
                          const void *bytes,
                          size_t count,
                          void *user_data,
                          mxt_user_data_free_fn user_data_free);

// Removes a file from memory.
//
// Errors: as mxt_files_view.
mxt_status mxt_files_remove(struct mxt_files *files, const char *name);

// mxt_model_load of files that lie elsewhere than in a folder. They are read in pieces; memory
// that was lent is not copied.
//
// Errors: those of mxt_model_load, with MXT_ERROR_IO for what the host's functions fail at, and
// MXT_ERROR_BUSY.
mxt_status mxt_model_load_from(const struct mxt_engine *engine,
                               struct mxt_files *files,
                               struct mxt_model **model);

// mxt_model_save_as to files that lie elsewhere than in a folder. `weights` is one of
// mxt_stored_weights. A failure leaves the files as they were, and where they are the host's its
// functions see to that.
//
// Errors: MXT_ERROR_NULL, MXT_ERROR_INVALID_ARGUMENT, MXT_ERROR_IO (what the host's functions fail
// at), MXT_ERROR_NOT_FINITE (a weight), MXT_ERROR_OUT_OF_MEMORY, MXT_ERROR_BUSY.
mxt_status mxt_model_save_to(const struct mxt_model *model,
                             struct mxt_files *files,
                             int32_t weights);

// mxt_model_load_lora of files that lie elsewhere than in a folder.
//
// Errors: those of mxt_model_load_lora, with MXT_ERROR_IO for what the host's functions fail at.
mxt_status mxt_model_load_lora_from(const struct mxt_model *model,
                                    struct mxt_files *files,
                                    struct mxt_model **adapted);

// mxt_model_save_lora to files that lie elsewhere than in a folder. In memory a checkpoint beside them
// stays; give adapters a set of files of their own where `commit` of the host replaces all.
//
// Errors: those of mxt_model_save_to, and MXT_ERROR_INVALID_ARGUMENT also for a model without
// adapters.
mxt_status mxt_model_save_lora_to(const struct mxt_model *model,
                                  struct mxt_files *files);

// mxt_trainer_load of files that lie elsewhere than in a folder or, where `optimizer` is not NULL,
// mxt_trainer_load_as.
//
// Errors: those of mxt_trainer_load_as, with MXT_ERROR_IO for what the host's functions fail at,
// and MXT_ERROR_BUSY.
mxt_status mxt_trainer_load_from(const struct mxt_engine *engine,
                                 struct mxt_files *files,
                                 const char *optimizer,
                                 struct mxt_trainer **trainer);

// mxt_trainer_save to files that lie elsewhere than in a folder. A failure leaves the files as
// they were, and where they are the host's its functions see to that. Collective; of a group, rank
// 0 writes, and files of other ranks are not touched.
//
// Errors: those of mxt_model_save_to, and MXT_ERROR_NOT_FINITE also for a moment.
mxt_status mxt_trainer_save_to(struct mxt_trainer *trainer, struct mxt_files *files);

// mxt_snapshot_save to files that lie elsewhere than in a folder.
//
// Errors: those of mxt_snapshot_save and of mxt_trainer_save_to.
mxt_status mxt_snapshot_save_to(struct mxt_snapshot *snapshot, struct mxt_files *files);

// The message of the last call with this handle that failed, on whichever thread; the empty string
// when there is none.
//
// Never NULL. The text belongs to the calling thread and stays valid until that thread's next
// call of mxt_files_last_error. Any thread may call it at any time.
const char *mxt_files_last_error(const struct mxt_files *files);

// Gives the files up, and those in memory with them; NULL does nothing. What was loaded from them
// stays usable.
void mxt_files_free(struct mxt_files *files);

// Watches the updates of the steps that `every` divides, from here on, those of mxt_trainer_run
// too: the stats of such a step have update_rms_max and update_rms_tensor, and
// mxt_trainer_tensor_update has what each tensor's update was. 0 ends it, and a new watch forgets
// what the one before has found. A step that is watched reads gradients and second moments once
// more. It changes nothing of the run, bit for bit, and is not saved with it.
//
// Errors: MXT_ERROR_NULL, MXT_ERROR_OUT_OF_MEMORY (the watch before stays), MXT_ERROR_BUSY,
// MXT_ERROR_INVALID_ARGUMENT in a group with shard_states.
mxt_status mxt_trainer_watch_updates(struct mxt_trainer *trainer, uint64_t every);

// Stores what the last update that was watched (mxt_trainer_watch_updates) did to the tensor of
// this name in `*update`, whose struct_size the caller has set. `tensor` is borrowed for the call.
//
// Errors: MXT_ERROR_NULL, MXT_ERROR_STRUCT_SIZE, MXT_ERROR_UTF8, MXT_ERROR_NO_SUCH_TENSOR,
// MXT_ERROR_INVALID_ARGUMENT (no update was watched yet), MXT_ERROR_BUSY.
mxt_status mxt_trainer_tensor_update(struct mxt_trainer *trainer,
                                     const char *tensor,
                                     struct mxt_tensor_update *update);

// Watches how the weights of blocks change, and what they are rounded to in the forward pass, over
// windows of `every` steps from here on, those of mxt_trainer_run too: mxt_trainer_weight_metrics
// has what each window has shown. 0 ends it; so does any call, also one that fails, of the watch
// before. It takes 12 bytes a weight and 8 for each element of the largest. It changes nothing of
// the run, bit for bit, and is not saved with it.
//
// Errors: MXT_ERROR_NULL, MXT_ERROR_INVALID_ARGUMENT (a recipe whose forward pass holds no weights
// in blocks of MXFP4 or NVFP4, unrotated, as "tetrajet" does; an optimizer with "master=split"),
// MXT_ERROR_OUT_OF_MEMORY, MXT_ERROR_BUSY.
mxt_status mxt_trainer_watch_weights(struct mxt_trainer *trainer, uint64_t every);

// Stores what the last whole window of steps (mxt_trainer_watch_weights) has shown in `*metrics`,
// whose struct_size the caller has set: of the tensor of this name or, where `tensor` is NULL, of
// all that are watched. `tensor` is borrowed for the call.
//
// Errors: MXT_ERROR_NULL, MXT_ERROR_STRUCT_SIZE, MXT_ERROR_UTF8, MXT_ERROR_NO_SUCH_TENSOR,
// MXT_ERROR_INVALID_ARGUMENT (no window is whole yet, or the tensor is none of those that are
// watched), MXT_ERROR_BUSY.
mxt_status mxt_trainer_weight_metrics(struct mxt_trainer *trainer,
                                      const char *tensor,
                                      struct mxt_weight_metrics *metrics);

// Fills `options` with the defaults. `struct_size` is sizeof(mxt_run_options) as the caller's
// compiler sees it.
//
// Errors: MXT_ERROR_NULL, MXT_ERROR_STRUCT_SIZE.
mxt_status mxt_run_options_init(struct mxt_run_options *options, size_t struct_size);

// Does options->steps steps on `dataset`, with evaluations, checkpoints and a callback, until they
// are done, the callback ends it or a stop is requested; stores what it did in `*result`
// (struct_size set by the caller; NULL if not wanted).
//
// The trainer is in use only inside each step, evaluation and checkpoint, not while the callback
// runs.
//
// An evaluation or a checkpoint that fails does not end the run: the log gets a warning, the
// result counts it, and the next one is tried when it is due. Where the last evaluation of the run
// failed, or its last checkpoint, the call returns that error, at its end: all steps that were to
// be done are, and after a failed evaluation they are also saved. Only an error of a step, a
// device that fails and a panic end the run; the steps before are then saved, if there is where to
// and the trainer is usable, but not where ranks of a group differ (MXT_ERROR_MISMATCH): others may
// have gone on. After any error mxt_trainer_steps_done counts the steps done, which
// can be saved (again), and `*result` is not written.
//
// Errors: those of mxt_trainer_step, mxt_trainer_eval and mxt_trainer_save, except MXT_STOPPED.
mxt_status mxt_trainer_run(struct mxt_trainer *trainer,
                           const struct mxt_dataset *dataset,
                           const struct mxt_run_options *options,
                           struct mxt_run_result *result);

#ifdef __cplusplus
}  // extern "C"
#endif  // __cplusplus

#endif  /* MXFP4TRAIN_H */
