# Made from include/mxfp4train.h by gen/generate.py: run that after a change of the header.

"""
The C API as it is: a function for every one of `mxfp4train.h`, structs of the same layout, and
the constants. The rest of the package stands on it; programs want `MXFP4Train`.

Functions check nothing and throw nothing. Where C wants a pointer they take a `Ref`, an `Array`
or `C_NULL`, and keep what they are given alive for the call.
"""
module LibMXFP4Train

# What the functions call: the SONAME, by which the system finds the library that is loaded already.
const libmxfp4train = "libmxfp4train.so.0"

"""
Version of this header, major part. It grows when programs have to be changed.
"""
const MXT_VERSION_MAJOR = 0

"""
Version of this header, minor part. It grows with additions.
"""
const MXT_VERSION_MINOR = 1

"""
Version of this header, patch part. It grows with corrections.
"""
const MXT_VERSION_PATCH = 0

"""
Version of this header as one number that can be compared: 1,002,003 for 1.2.3.
"""
const MXT_VERSION_NUMBER = (((MXT_VERSION_MAJOR * 1000000) + (MXT_VERSION_MINOR * 1000)) + MXT_VERSION_PATCH)

"""
Version of the binary interface, the number in libmxfp4train.so.N. It changes only when
programs that were compiled with an earlier header could not run with the library.
"""
const MXT_ABI_VERSION = 0

"""
Most dimensions that a tensor can have.
"""
const MXT_MAX_RANK = 4

"""
In place of a target: the position is no part of the loss, as -100 is in PyTorch.
"""
const MXT_IGNORED = 4294967295

"""
What mxt_file_open_fn returns where there is no file of the name.
"""
const MXT_NO_SUCH_FILE = 1

"""
What a call returns: MXT_OK, or one of the negative numbers of mxt_status_code. Later versions
may add codes, so treat an unknown negative number as an error.
"""
const mxt_status = Int32

# mxt_status_code: The values of mxt_status. A value never changes its meaning and is never used again.

"""
The call did what it says.
"""
const MXT_OK = Int32(0)

"""
A pointer that must not be NULL is NULL.
"""
const MXT_ERROR_NULL = Int32(-1)

"""
An argument or an option has a value that the call cannot use.
"""
const MXT_ERROR_INVALID_ARGUMENT = Int32(-2)

"""
A string is not UTF-8.
"""
const MXT_ERROR_UTF8 = Int32(-3)

"""
The struct_size of a struct is none that this library knows, or a part of the struct that it
does not know is not zero.
"""
const MXT_ERROR_STRUCT_SIZE = Int32(-4)

"""
Another call is inside this object: from another thread, or this call came from a callback.
"""
const MXT_ERROR_BUSY = Int32(-5)

"""
A panic in an earlier call left this object unusable: free it.
"""
const MXT_ERROR_POISONED = Int32(-6)

"""
A defect of the library showed itself inside this call. The message says where; please
report it. The handle is poisoned, the process and all other handles are sound.
"""
const MXT_ERROR_PANIC = Int32(-7)

"""
A file or folder cannot be opened, read, written or renamed.
"""
const MXT_ERROR_IO = Int32(-8)

"""
A file is damaged, truncated or of a kind that this version does not read.
"""
const MXT_ERROR_FORMAT = Int32(-9)

"""
A file is sound but does not fit what it is used with, or the ranks of a group do not have
alike what they must.
"""
const MXT_ERROR_MISMATCH = Int32(-10)

"""
A token is not below the vocabulary size of the model.
"""
const MXT_ERROR_TOKEN_RANGE = Int32(-11)

"""
More memory is needed than the limit allows or the system gives.
"""
const MXT_ERROR_OUT_OF_MEMORY = Int32(-12)

"""
The device or this build cannot do it; the message says what can be done instead.
"""
const MXT_ERROR_UNSUPPORTED = Int32(-13)

"""
A loss, a gradient norm or a weight is NaN or infinite.
"""
const MXT_ERROR_NOT_FINITE = Int32(-14)

"""
The model has no tensor of this name.
"""
const MXT_ERROR_NO_SUCH_TENSOR = Int32(-15)

"""
The caller's buffer is too small; the message says how much is needed.
"""
const MXT_ERROR_BUFFER_TOO_SMALL = Int32(-16)

"""
The handle was made before fork() in a parent of this process. Free it, or leave it.
"""
const MXT_ERROR_FORKED = Int32(-17)

"""
A GPU failed. The handle is poisoned: free it and what was made on the same device.
"""
const MXT_ERROR_DEVICE = Int32(-18)

"""
A stop was asked for (mxt_trainer_request_stop) while the call was at work. It has changed
nothing; no harm was done.
"""
const MXT_STOPPED = Int32(-19)

"""
Another rank of the group failed, is gone, or does not answer. The message has its rank and
its words. Where it said why, the call has changed nothing and the group goes on; otherwise
the group has ended, and every further collective call returns this at once.
"""
const MXT_ERROR_PEER = Int32(-20)

# mxt_log_level: How much a log line matters.

"""
Something is likely wrong, yet the call goes on.
"""
const MXT_LOG_LEVEL_WARNING = Int32(1)

"""
What a user wants to know once: device, kernels, memory.
"""
const MXT_LOG_LEVEL_INFO = Int32(2)

"""
Details for whoever looks for a fault.
"""
const MXT_LOG_LEVEL_DEBUG = Int32(3)

# mxt_architecture: The kind of model.

"""
GPT-2: LayerNorm before each half of a block, learned positions, GELU, biases, and one
matrix for the embedding and the head unless tied_head is 0.
"""
const MXT_ARCHITECTURE_GPT2 = Int32(0)

"""
Llama: RMSNorm before each half of a block, rotary positions, SwiGLU, heads that share keys and
values where kv_heads says so, and no biases. With qkv_bias it is a Qwen2, with qk_norm a Qwen3;
Mistral and SmolLM are Llamas. A tensor \"self_attn.qkv_proj\" of a block has the rows of q_proj,
k_proj and v_proj in files, and \"mlp.gate_up_proj\" those of gate_proj and up_proj; these names are
taken as well where one tensor is read or written.
"""
const MXT_ARCHITECTURE_LLAMA = Int32(1)

# mxt_rope_scaling: How rotary positions are stretched.

"""
Not at all.
"""
const MXT_ROPE_SCALING_NONE = Int32(0)

"""
All alike: positions are divided by rope_factor.
"""
const MXT_ROPE_SCALING_LINEAR = Int32(1)

"""
As Llama 3.1 has it: what turns less than rope_low_frequency times in rope_original_context
positions is divided by rope_factor, what turns more than rope_high_frequency times is not.
"""
const MXT_ROPE_SCALING_LLAMA3 = Int32(2)

# mxt_activation: What the MLP of a block applies between its two layers.

"""
GELU in its tanh form, as GPT-2 has it (\"gelu_new\").
"""
const MXT_ACTIVATION_GELU_TANH = Int32(0)

"""
GELU itself, by the error function (\"gelu\").
"""
const MXT_ACTIVATION_GELU = Int32(1)

# mxt_dtype: The number format of a tensor's values as they cross this interface.

"""
32-bit floating point.
"""
const MXT_DTYPE_F32 = Int32(0)

# mxt_lora_layer: The linear layers of a block, as bits.

"""
What makes queries, keys and values: attn.c_attn, or self_attn.qkv_proj of Llama's blocks.
"""
const MXT_LORA_LAYER_ATTN_C_ATTN = Int32(1)

"""
What attention's result passes through: attn.c_proj, or self_attn.o_proj.
"""
const MXT_LORA_LAYER_ATTN_C_PROJ = Int32(2)

"""
The first of the MLP: mlp.c_fc, or mlp.gate_up_proj.
"""
const MXT_LORA_LAYER_MLP_C_FC = Int32(4)

"""
The second of the MLP: mlp.c_proj, or mlp.down_proj.
"""
const MXT_LORA_LAYER_MLP_C_PROJ = Int32(8)

# mxt_stored_weights: What the weights of a saved model are stored as.

"""
f32, as they are.
"""
const MXT_STORED_WEIGHTS_F32 = Int32(0)

"""
f16, to nearest. Numbers that round above 65504 are refused.
"""
const MXT_STORED_WEIGHTS_F16 = Int32(1)

"""
bf16, to nearest.
"""
const MXT_STORED_WEIGHTS_BF16 = Int32(2)

"""
The linear layers and a head of its own in MXFP4, 4.25 bits a weight, as a decoder in MXFP4 has
them; all else in f32. Read by this library alone.
"""
const MXT_STORED_WEIGHTS_MXFP4 = Int32(3)

# mxt_decoder_weights: What a model's linear layers and its head are computed in where it writes text.

"""
f32; on a GPU bf16 where a trainer keeps the weights with master=split.
"""
const MXT_DECODER_WEIGHTS_F32 = Int32(0)

"""
bf16, with sums in f32.
"""
const MXT_DECODER_WEIGHTS_BF16 = Int32(1)

"""
MXFP4, 4.25 bits a weight; what they are multiplied with is in bf16 on a GPU, and on a
processor in 8 bits.
"""
const MXT_DECODER_WEIGHTS_MXFP4 = Int32(2)

# mxt_draft: Who guesses the next tokens, for the model to check several at once.

"""
Nobody: a token takes a pass of its own.
"""
const MXT_DRAFT_NONE = Int32(0)

"""
The text: what followed its last three, two or one tokens where they stood before. Gains where
a text repeats itself, as code does.
"""
const MXT_DRAFT_NGRAM = Int32(1)

"""
The model with its weights in MXFP4, a copy that takes 4.25 bits a weight more. On a GPU for
weights in bf16.
"""
const MXT_DRAFT_MXFP4 = Int32(2)

"""
The same, which the text guesses for.
"""
const MXT_DRAFT_MXFP4_NGRAM = Int32(3)

# mxt_token_type: What a token is in a file without a header to say it.

"""
Found out by a look at the tokens: 16 bits, unless they must be 32 or 64. A file in which
they may be either is refused.
"""
const MXT_TOKEN_TYPE_AUTO = Int32(0)

"""
Two unsigned bytes.
"""
const MXT_TOKEN_TYPE_U16 = Int32(1)

"""
Four unsigned bytes.
"""
const MXT_TOKEN_TYPE_U32 = Int32(2)

"""
Eight signed bytes.
"""
const MXT_TOKEN_TYPE_I64 = Int32(3)

"""
One unsigned byte.
"""
const MXT_TOKEN_TYPE_U8 = Int32(4)

"""
Four signed bytes.
"""
const MXT_TOKEN_TYPE_I32 = Int32(5)

# mxt_schedule: The curve of the learning rate after the warm-up.

"""
lr for ever.
"""
const MXT_SCHEDULE_CONSTANT = Int32(0)

"""
Half a cosine from lr down to min_lr at total_steps.
"""
const MXT_SCHEDULE_COSINE = Int32(1)

"""
A straight line from lr down to min_lr at total_steps.
"""
const MXT_SCHEDULE_LINEAR = Int32(2)

"""
lr, then a straight line down to min_lr over the last decay_steps.
"""
const MXT_SCHEDULE_TRAPEZOID = Int32(3)

# mxt_transport: How the gradients of ranks get from GPU to GPU. It changes no bit where they are sent as f32 (gradient_wire). On processors they go through the callbacks.

"""
As MXT_TRANSPORT_PEER where that can be, else as MXT_TRANSPORT_NCCL, else as
MXT_TRANSPORT_HOST, with a warning to the log.
"""
const MXT_TRANSPORT_AUTO = Int32(0)

"""
By the callbacks, through the memory of the host.
"""
const MXT_TRANSPORT_HOST = Int32(1)

"""
By NCCL, of which every rank needs the same release (libnccl.so.2, 2.19 or newer), and a GPU of
its own. Where it cannot be, mxt_engine_new returns MXT_ERROR_UNSUPPORTED and says why.
"""
const MXT_TRANSPORT_NCCL = Int32(2)

"""
In each other's memory: of at most 8 GPUs of one host that reach it (over NVLink or PCIe),
each of one rank. Likewise.
"""
const MXT_TRANSPORT_PEER = Int32(3)

# mxt_wire: What gradients are sent as from rank to rank.

"""
As they are: 4 bytes a number.
"""
const MXT_WIRE_F32 = Int32(0)

"""
To nearest: 2 bytes.
"""
const MXT_WIRE_BF16 = Int32(1)

"""
E4M3 to nearest, with a scale for 32 numbers: 1.03 bytes.
"""
const MXT_WIRE_FP8 = Int32(2)

"""
E2M1 with a scale for 32 numbers, rotated and rounded stochastically, so that the mean is the
gradient: 0.53 bytes.
"""
const MXT_WIRE_MXFP4 = Int32(3)

# mxt_run_end: Why a run ended.

"""
All steps are done.
"""
const MXT_RUN_END_FINISHED = Int32(0)

"""
The callback returned a number other than 0.
"""
const MXT_RUN_END_CALLBACK = Int32(1)

"""
mxt_trainer_request_stop was called, maybe during a step or an evaluation, which was given
up.
"""
const MXT_RUN_END_REQUEST = Int32(2)

"""
Hands out and takes in blocks of `bytes_per_rank` bytes, one for each rank: block r of `send` goes
to rank r, and block r of `receive` came from it, this rank's own included. The buffers are
borrowed for the call and do not overlap. MPI_Alltoall of MPI_BYTE is one; a call has some tens
of MiB at most.

Returns 0 when this rank's part is done; any other number ends the group: the call that needed it
returns MXT_ERROR_PEER, and so does every later one, at once. It must give up by itself, by a
deadline or when a connection breaks, where another rank is gone.

Runs on the thread of the call that needs it. It must not throw, longjmp, or call the library.
"""
const mxt_all_to_all_fn = Ptr{Cvoid}

"""
Gathers `bytes_per_rank` bytes of every rank: `send` of all ranks, one behind the other in their
order, become `receive`, this rank's own included. MPI_Allgather of MPI_BYTE is one. All else as
for mxt_all_to_all_fn.
"""
const mxt_all_gather_fn = Ptr{Cvoid}

"""
This rank gives up: calls in which other ranks wait for it should fail. Called at most once, on the
thread of the call that failed, and nothing else is called then. It must not throw, longjmp, or
call the library.
"""
const mxt_abort_fn = Ptr{Cvoid}

"""
Gives back what a `user_data` pointer stands for. It must not throw or longjmp.
"""
const mxt_user_data_free_fn = Ptr{Cvoid}

"""
Receives a log line. `level` is one of mxt_log_level, `message` a UTF-8 line without a line
end, borrowed for the call.

Runs on the thread that is inside the call that logs, and on several at once where several
threads use the engine. It must not throw or longjmp, and calls on the object whose call logs
return MXT_ERROR_BUSY.
"""
const mxt_log_fn = Ptr{Cvoid}

"""
Gives `bytes` bytes of memory, at least one, at a multiple of `alignment`, a power of two, with
whatever is in them; NULL where there is none, which is MXT_ERROR_OUT_OF_MEMORY of the call that
needs them. Nothing else may use them until they are given to mxt_deallocate_fn.

Runs on the thread that is inside a call, and on several at once where several threads use the
engine. It must not throw, longjmp, or call the library.
"""
const mxt_allocate_fn = Ptr{Cvoid}

"""
Takes back memory, with the size and the alignment that it was asked for with. All else as for
mxt_allocate_fn.
"""
const mxt_deallocate_fn = Ptr{Cvoid}

"""
Receives each token as it is sampled. Returns 0 to go on; any other number ends the text with
this token.

Runs on the thread that called mxt_model_generate or mxt_decoder_generate. It must not throw or
longjmp, and of the first call's model, its trainer and its decoders' logits, of the second's decoder
and its model's trainer, calls return MXT_ERROR_BUSY.
"""
const mxt_token_fn = Ptr{Cvoid}

"""
Fills window `number` of a dataset: `tokens` gets sequence_length + 1 tokens, of which all but
the last are inputs, and each but the first the target of the one before it; `weights` has
sequence_length numbers, a factor of each target's loss, at least 0 and 1 before: 0 for what is
not to be learned, as a prompt or padding. Both are borrowed for the call. The same number has
to give the same window whenever it is asked for, so that a run that is resumed is the run that
was not stopped.

Returns 0; any other number ends the call that needs the window with MXT_ERROR_IO, and the
trainer is as before it. A token outside of the vocabulary ends it with MXT_ERROR_TOKEN_RANGE, a
weight that is not finite with MXT_ERROR_NOT_FINITE, one below 0 with
MXT_ERROR_INVALID_ARGUMENT.

Runs on the thread that is inside that call; on several threads at once where several trainers
use the dataset. Calls on the trainer that it fills for, and on its model, return
MXT_ERROR_BUSY. It must not throw or longjmp.
"""
const mxt_window_fn = Ptr{Cvoid}

"""
Fills window `number` of a dataset, as mxt_window_fn, and `documents` besides: for each of the
sequence_length inputs the number of the document that it is of, which is 0 before.
"""
const mxt_packed_window_fn = Ptr{Cvoid}

"""
Makes losses of logits, and their gradients, for some rows of a batch: all rows come, in their
order, each once, some 32 MiB of logits at a time, or 64 rows where these take more. What is
written for rows whose target is ignored, or whose weight is 0, does not count. All that `rows`
points to is borrowed for the call.

Returns 0 to go on; any other number ends mxt_trainer_forward_backward with MXT_STOPPED. A number
that it writes and that is not finite shows at mxt_trainer_update, as MXT_ERROR_NOT_FINITE.

Runs on the thread that called mxt_trainer_forward_backward. Calls on that trainer and its model
return MXT_ERROR_BUSY. It must not throw or longjmp.
"""
const mxt_loss_fn = Ptr{Cvoid}

"""
Opens the file `name` for reading, such as \"model.safetensors\": stores in `*file` what the other
functions get for it, which is not looked at, and in `*size` its bytes. `name` is borrowed for
the call. Several files are open at once.

Returns 0; MXT_NO_SUCH_FILE where there is none of this name, which is no failure; any other
number ends the load.
"""
const mxt_file_open_fn = Ptr{Cvoid}

"""
Stores the `count` bytes from `offset` on in `to`, all of which lie in the file. A file is what
it was when it was opened. Returns 0; any other number ends the load.
"""
const mxt_file_read_fn = Ptr{Cvoid}

"""
Ends the use of a file: called exactly once for each that was opened or created, also after a
failure: a new file that has fewer bytes then than were announced is one of a save that has
failed. Returns 0; any other number ends a save, of a file that was written.
"""
const mxt_file_close_fn = Ptr{Cvoid}

"""
Begins a save. Returns 0; any other number ends it, and nothing else is called.
"""
const mxt_files_begin_fn = Ptr{Cvoid}

"""
Begins the file `name`, of which `size` bytes are going to be written, and stores in `*file`
what the other functions get for it. `name` is borrowed for the call. One file is written at a
time. Returns 0; any other number ends the save.
"""
const mxt_file_create_fn = Ptr{Cvoid}

"""
Appends `count` bytes to the file. Returns 0; any other number ends the save.
"""
const mxt_file_write_fn = Ptr{Cvoid}

"""
Makes what was written since the save began the checkpoint, all of it at once. Files of the one
before that were not written again are no part of it: mxt_file_open_fn must not find a
\"trainer.json\" or \"trainer.safetensors\" any more where a model was saved without a training
state. Returns 0; any other number says that this was not done, and the save is given up.
"""
const mxt_files_commit_fn = Ptr{Cvoid}

"""
Gives up the save that was begun, for something failed: called once in place of a successful
commit, when all its files are closed. What the files were before the save, they must be after
it.
"""
const mxt_files_abort_fn = Ptr{Cvoid}

"""
Says why another of the functions has just failed, as a line for a person: UTF-8, read before
anything else is called. NULL where there is nothing to say.
"""
const mxt_files_error_fn = Ptr{Cvoid}

"""
Sees every step of a run. `eval` is NULL except after a step that was followed by an evaluation,
and where that failed or was stopped.
Both structs are borrowed for the call. Returns 0 to go on; any other number ends the run.

Runs on the thread that called mxt_trainer_run, after the step, its evaluation and its
checkpoint. It may call the library, on this trainer too: save, eval, set_lr, generate, even
free. A C++ exception passes through mxt_trainer_run, which then saves nothing, and leaves the
trainer usable; do not longjmp.
"""
const mxt_step_fn = Ptr{Cvoid}

"""
Tokens to train on: files that are mapped into memory, tokens of the host, or windows that it
fills. It is never changed, so any number of threads and trainers may use it at once. Make with
one of the mxt_dataset_open or mxt_dataset_from functions, free with mxt_dataset_free.

All its tokens are checked against a model's vocabulary before the first step or evaluation of a
trainer: at once up to 256 MiB, which takes some 0.1 s; else by a thread of the dataset while
the training goes on, and what it finds is the error of the next step. The thread blocks all
signals but faults, and has ended when mxt_dataset_free returns and no other call uses the
dataset.

Nothing that happens to a file ends the process. Where its tokens are not there any more,
because it has become shorter or its disk fails, the call that needs them returns MXT_ERROR_IO;
a trainer is then as before the call.
"""
mutable struct mxt_dataset end

"""
Texts of a model that grow: tokens in, the logits of what comes next out, of which keys and values
are kept, so that a token takes one row. A call needs the decoder for itself, and for logits the
model as one that reads it; several decoders of one model may run at once. It follows its model:
where weights have been changed, the next logits are those of the new ones. Make with
mxt_decoder_new, free with mxt_decoder_free.
"""
mutable struct mxt_decoder end

"""
A device with its worker threads. Everything else is made from one. It is never changed, so any
number of threads may use it at once. Make with mxt_engine_new, free with mxt_engine_free.
"""
mutable struct mxt_engine end

"""
A set of named files that checkpoints are loaded from and saved to, in place of a folder: the
host's (mxt_files_from_callbacks) or in memory (mxt_files_in_memory). Their bytes are those of a
folder's files: \"config.json\" and \"model.safetensors\" and, of a trainer, \"trainer.json\" and
\"trainer.safetensors\". Loads read a model in several files with an index, too.

What uses it needs it for itself; loads from memory may run at once on several threads. Make
with one of the two, free with mxt_files_free.
"""
mutable struct mxt_files end

"""
A model: its shape and its weights. Several handles can be the same model (see
mxt_trainer_model). Calls that change it, or that take it without const, need it for themselves;
calls with a const model may run at once on several threads. Make with mxt_model_new,
mxt_model_load or mxt_trainer_model, free with mxt_model_free.
"""
mutable struct mxt_model end

"""
A copy in the host's memory of all that mxt_trainer_save would write, which a thread of the host
saves while training goes on: weights in f32, and what the optimizer and the recipe keep, in the
bytes that they take on the device. It shares nothing with its trainer but the model, which stays
alive with it, so that calls on either do not meet. Make with mxt_trainer_snapshot, free with
mxt_snapshot_free.
"""
mutable struct mxt_snapshot end

"""
A model in training: weights, moments, schedule, and the number of steps done. It needs its
model for itself while a call is inside: then calls on the model, on the trainer and on other
trainers of that model return MXT_ERROR_BUSY. Make with mxt_trainer_new or mxt_trainer_load,
free with mxt_trainer_free.
"""
mutable struct mxt_trainer end

"""
Ranks that train one model together, of which this program (or this thread of it) is one. Fill it
with mxt_group_init, and put it into mxt_engine_options.

Every rank computes its part of each step and has all of the model. For given `lanes` of the
trainer, losses, weights and files are the same bits on any number of ranks that the lanes allow.

Calls on an engine with a group, and on what is made from it, that are collective:
mxt_engine_new, mxt_trainer_new, _load, _load_as, _step, _step_unless_stopped, _step_tokens,
_update, _eval, _save and _run. All ranks make them in the same order with the same arguments,
but for tokens that a rank brings, and folders: rank 0 writes to its own. What fails on one
rank, fails on all, before anything is changed: the rank itself has its error, the others
MXT_ERROR_PEER with its words, or MXT_STOPPED. Ranks that do not have alike what they must get
MXT_ERROR_MISMATCH with what differs. What the library refuses before it begins (MXT_ERROR_NULL,
_STRUCT_SIZE, _BUSY, _POISONED, _INVALID_ARGUMENT of fields of this struct) the others do not
hear of: they wait, and the rank has to make the call again, or end. All other calls, and
freeing, are a rank's own, but for mxt_trainer_snapshot and mxt_snapshot_renew with
shard_states. One group makes one call at a time: a second thread that makes another one on the
same engine waits for it.

Where NCCL carries gradients, it starts threads of its own in mxt_engine_new, and takes about
a GiB of the GPU beside what is planned. It is given back on a thread that mxt_engine_free, or what
frees the last of the engine, waits half a second for.
"""
struct mxt_group
    # Set by mxt_group_init.
    struct_size::Csize_t
    # Which rank this is, from 0 on. Default 0.
    rank::UInt32
    # How many there are. 1 (default) is no group: nothing below is used.
    size::UInt32
    # Called for gradients, at every step.
    all_to_all::mxt_all_to_all_fn
    # Called for all else.
    all_gather::mxt_all_gather_fn
    # Called when this rank gives up, or NULL (default).
    abort::mxt_abort_fn
    # Passed to the functions above. It must stay valid until the engine and everything made from it
    # is freed, or until `user_data_free` is called with it.
    user_data::Ptr{Cvoid}
    # Called with `user_data` exactly once for each call of mxt_engine_new that succeeds, when the
    # library will never call the functions above again; as log_user_data_free of
    # mxt_engine_options. Where there is one rank, that is the end of mxt_engine_new itself. NULL
    # (default): nothing is called.
    user_data_free::mxt_user_data_free_fn
    # Longest wait for another rank where gradients go from GPU to GPU, in seconds: a GPU cannot
    # tell a rank that is gone from one that is slow, and the callbacks show one that is gone
    # earlier. The call returns MXT_ERROR_PEER then. At least 1. Default 600.
    timeout_seconds::UInt64
    # One of mxt_transport, the same on all ranks. Default MXT_TRANSPORT_AUTO.
    transport::Int32
    # 1: the optimizer's states of each tensor are kept by one rank alone, which updates it and
    # gives it to all others, so that a rank takes a part of their memory (ZeRO-1); the same on
    # all ranks. It changes no bit. For adamw and muon without ramping; mxt_trainer_watch_updates
    # is MXT_ERROR_INVALID_ARGUMENT then. mxt_trainer_snapshot is collective, and that of rank 0
    # has all that there is to save. What a rank kept is lost with it, and where a group ends
    # within a step, weights may be those of within it: go on from a checkpoint then. 0 (default):
    # every rank keeps all.
    shard_states::Int32
    # One of mxt_wire, the same on all ranks: what gradients are sent as, for links that are
    # slower than what computes gradients. Sums are made in f32. All but MXT_WIRE_F32 change
    # losses a little, and make their bits those of so many ranks; not with MXT_TRANSPORT_PEER,
    # and MXT_TRANSPORT_AUTO passes over that. Default MXT_WIRE_F32.
    gradient_wire::Int32
    # Must be 0.
    reserved::Int32
end

"""
What an engine is made from. Fill it with mxt_engine_options_init.
"""
struct mxt_engine_options
    # Set by mxt_engine_options_init.
    struct_size::Csize_t
    # "cpu"; "cuda" or "cuda:0" for the first NVIDIA GPU, "cuda:1" for the second and so on;
    # "auto" for the first GPU where there is one that works, else the CPU. NULL is "cpu".
    # Borrowed for the call.
    device::Cstring
    # Worker threads on the CPU, at most 1,024. 0 (default) takes one for each core that the
    # process may use, which ranks of a group on the same host share. Results do not depend on it. A
    # GPU takes none.
    threads::Csize_t
    # Seed of everything random: initial weights, data order, rounding, transforms. Default 1337.
    seed::UInt64
    # Most bytes that one model with its trainer may take. 0 (default) sets no limit.
    memory_limit::UInt64
    # Receives log lines. NULL (default): the library is silent.
    log::mxt_log_fn
    # Passed to `log`. It must stay valid until the engine and everything made from it is freed,
    # or until `log_user_data_free` is called with it.
    log_user_data::Ptr{Cvoid}
    # A CUDA stream of the host (CUstream or cudaStream_t) in the primary context of the device,
    # where cudaStreamCreate makes them. All work of the engine is queued there, in the order of
    # the calls, between the host's own. It must not be capturing while a call is inside, and must
    # live until the engine and everything made from it is freed. NULL (default): the engine makes
    # its own. With device "auto" there must be a GPU then.
    cuda_stream::Ptr{Cvoid}
    # Called with `log_user_data`, whatever it is, exactly once for each call of mxt_engine_new
    # that succeeds, when the library will never call `log` again: at the end of the call that
    # gives up the last of the engine and all that was made from it, on the thread of that call,
    # after the worker threads have ended. Where `log` is NULL, that is the end of mxt_engine_new
    # itself. An mxt_engine_new that fails never calls it: log_user_data is the caller's still. A
    # child made by fork() that frees the handles calls it as well, for its own copy of memory.
    # NULL (default): nothing is called.
    log_user_data_free::mxt_user_data_free_fn
    # The ranks that train together, of which this engine is one; see mxt_group. mxt_engine_new is
    # collective then. Borrowed for the call. NULL (default): it trains alone.
    group::Ptr{mxt_group}
    # Gives large memory of the host in place of the system: on the CPU weights, gradients,
    # states, activations and workspaces, and on every device what snapshots copy. It is asked for
    # some large blocks by the calls that make models, trainers, decoders and snapshots, not by
    # steps. NULL (default): the system maps them.
    allocate::mxt_allocate_fn
    # Takes back what `allocate` gave. Must be there where that is.
    deallocate::mxt_deallocate_fn
    # Passed to the two. It must stay valid until the engine and everything made from it is freed,
    # or until `allocator_user_data_free` is called with it.
    allocator_user_data::Ptr{Cvoid}
    # Called with `allocator_user_data` exactly once for each call of mxt_engine_new that
    # succeeds, when all memory is given back and the library will never call the two again; as
    # log_user_data_free. Where `allocate` is NULL, that is the end of mxt_engine_new itself. NULL
    # (default): nothing is called.
    allocator_user_data_free::mxt_user_data_free_fn
end

"""
What an engine, and all that was made from it, has in use of large memory. Set struct_size to
sizeof(mxt_memory_use) before the call that fills it. Beside that there are buffers of a call,
and what a GPU's driver takes.
"""
struct mxt_memory_use
    # sizeof(mxt_memory_use), set by the caller.
    struct_size::Csize_t
    # Bytes of the device that are in use now: weights, gradients, states, activations and
    # workspaces of models, trainers and decoders. Of the CPU, this is memory of the host.
    device_bytes::UInt64
    # The most of them at any time since the engine was made.
    device_peak::UInt64
    # The most bytes that the device has for all that runs there, or memory_limit of the engine
    # where that is less; 0 where the system does not say.
    device_limit::UInt64
    # Bytes of the host beside them that are in use now: snapshots.
    host_bytes::UInt64
    # The most of them at any time since the engine was made.
    host_peak::UInt64
    # The most bytes that the machine and the process's control groups give; 0 where the system
    # does not say.
    host_limit::UInt64
end

"""
The shape of a model. Fill it with mxt_model_config_init, which makes it GPT-2 small (124M).
"""
struct mxt_model_config
    # Set by mxt_model_config_init.
    struct_size::Csize_t
    # Number of different tokens; tokens are 0 to vocab_size - 1. Default 50257.
    vocab_size::Csize_t
    # Longest sequence in tokens that the model can see. Default 1024.
    context_length::Csize_t
    # Number of blocks. Default 12.
    layers::Csize_t
    # Attention heads of a block; must divide channels where head_size is 0. Default 12.
    heads::Csize_t
    # Width of the model. Default 768.
    channels::Csize_t
    # Added to the variance in LayerNorm, or to the mean square in RMSNorm. Default 1e-5.
    layer_norm_epsilon::Cfloat
    # One of mxt_architecture. Default MXT_ARCHITECTURE_GPT2.
    architecture::Int32
    # Width of the MLP inside a block. Default 0, which stands for 4 x channels, or in Llama's blocks
    # for 8/3 x channels, rounded up to a multiple of 256, and is what a model of that width reports.
    mlp_channels::Csize_t
    # One of mxt_activation, of GPT-2's blocks; Llama's have SwiGLU whatever it is. Default
    # MXT_ACTIVATION_GELU_TANH.
    activation::Int32
    # 1 where the head shares its weights with the token embedding; 0 where it has a tensor
    # "lm_head.weight" (vocab_size, channels) of its own. Default 1.
    tied_head::Int32
    # 1 where attention divides its scores by the square root of a head's width, 0 where it does
    # not. Default 1.
    scale_attention::Int32
    # 1 where attention divides its scores by the number of its block, from 1 on, as well. Default
    # 0.
    scale_attention_by_layer::Int32
    # What is trained beside linear layers, in the place of everything else, is of this rank (LoRA).
    # Default 0: nothing is.
    lora_rank::Csize_t
    # Over the rank, the factor of what is added to a layer's result. 0 (default) is twice the rank.
    # Without a rank neither this nor lora_layers counts.
    lora_alpha::Cfloat
    # Which linear layers of every block have it: some of mxt_lora_layer. 0 (default) is all.
    lora_layers::UInt32
    # Heads of keys and values of a block, which divide heads; of Llama's blocks. Default 0, which
    # stands for heads and is what a model with as many reports.
    kv_heads::Csize_t
    # Channels of a head, an even number; of Llama's blocks. Default 0, which stands for channels /
    # heads and is what a model with such heads reports.
    head_size::Csize_t
    # Pair i of a head of n channels turns by rope_theta^(-2 i / n) a position; of Llama's blocks.
    # Default 10000.
    rope_theta::Cdouble
    # With rope_scaling MXT_ROPE_SCALING_LLAMA3: positions that the model saw before. Default 8192.
    rope_original_context::Csize_t
    # 1 where what makes queries, keys and values has a bias; of Llama's blocks, as in Qwen2. Default 0.
    qkv_bias::Int32
    # 1 where every head of queries and keys is normalized; of Llama's blocks, as in Qwen3. Default 0.
    qk_norm::Int32
    # One of mxt_rope_scaling. Default MXT_ROPE_SCALING_NONE, with which none of what follows counts.
    rope_scaling::Int32
    # By how much, from 1 on. Default 1.
    rope_factor::Cfloat
    # Of MXT_ROPE_SCALING_LLAMA3, above 0. Default 1.
    rope_low_frequency::Cfloat
    # Of MXT_ROPE_SCALING_LLAMA3, above rope_low_frequency. Default 4.
    rope_high_frequency::Cfloat
end

"""
What there is to know about a tensor. Set struct_size to sizeof(mxt_tensor_info) before the
call that fills it.
"""
struct mxt_tensor_info
    # sizeof(mxt_tensor_info), set by the caller.
    struct_size::Csize_t
    # The name that Hugging Face's gpt2 or llama gives it, such as
    # "transformer.h.0.attn.c_attn.weight"; see mxt_architecture for what has no name there. Valid as
    # long as the model handle.
    name::Cstring
    # Product of the dimensions.
    element_count::UInt64
    # The dimensions, slowest first; those from rank on are 0. Linear weights of GPT-2
    # are (in, out), those of Llama's blocks (out, in).
    shape::NTuple{4,UInt64}
    # Number of dimensions.
    rank::UInt32
    # Number format of mxt_model_tensor_read and mxt_model_tensor_write: MXT_DTYPE_F32.
    dtype::Int32
end

"""
How tokens are sampled. Fill it with mxt_generate_options_init.
"""
struct mxt_generate_options
    # Set by mxt_generate_options_init.
    struct_size::Csize_t
    # Most tokens to generate. Default 256.
    max_tokens::Csize_t
    # Keeps the k most likely tokens. 0 (default) keeps all.
    top_k::Csize_t
    # Seed of the draws: the same seed gives the same text. Default 1337.
    seed::UInt64
    # Divides the logits: lower is more certain; 0 always takes the most likely token.
    # Default 0.8.
    temperature::Cfloat
    # Keeps the most likely tokens whose probabilities add up to p. 1 (default) keeps all.
    top_p::Cfloat
    # Receives each token as it is sampled, or NULL (default).
    on_token::mxt_token_fn
    # Passed to on_token.
    user_data::Ptr{Cvoid}
    # Tokens that end the text, such as the one that stands between documents. The one that was
    # sampled is the last of the new tokens, and on_token receives it. NULL (default) is none.
    # Borrowed for the call.
    stop_tokens::Ptr{UInt32}
    # Number of stop_tokens. Default 0.
    stop_token_count::Csize_t
    # Keeps the tokens that are at least this part as likely as the most likely one. 0 (default)
    # keeps all.
    min_p::Cfloat
    # Divides the logits above 0 of tokens that the text has, prompt included, and multiplies those
    # below: above 1 the text repeats itself less. 1 (default) changes nothing.
    repetition_penalty::Cfloat
    # One of mxt_decoder_weights. Default MXT_DECODER_WEIGHTS_F32. Not looked at by
    # mxt_decoder_generate.
    weights::Int32
    # 1 where a quarter of the context falls out of a text that exceeds it at once, so that all is
    # computed again only then; 0 (default) where a token falls out for each that comes, every one of
    # which takes the whole computation.
    slide::Int32
    # One of mxt_draft: who guesses the next tokens, for several to be checked in one pass. The text
    # is the same whoever does. Default MXT_DRAFT_NONE.
    draft::Int32
    # Tokens that are guessed at a time, up to 15; 0 (default) is as many as gain most.
    draft_tokens::UInt32
    # Receives the number of tokens that were guessed, or NULL (default).
    drafted::Ptr{UInt64}
    # Receives how many of them the model chose, too, or NULL (default).
    accepted::Ptr{UInt64}
end

"""
What a decoder is made for. Fill it with mxt_decoder_options_init.
"""
struct mxt_decoder_options
    # Set by mxt_decoder_options_init.
    struct_size::Csize_t
    # Texts beside each other, numbered from 0, up to 65536. Default 1.
    sequences::Csize_t
    # Most tokens of each. 0 (default) is the model's context.
    room::Csize_t
    # One of mxt_decoder_weights. Default MXT_DECODER_WEIGHTS_F32.
    weights::Int32
    # 1 keeps the weights in MXFP4, too, for drafts of mxt_decoder_generate; on a GPU beside weights in
    # bf16 alone, and not beside weights that are in MXFP4 themselves. Default 0.
    drafts::Int32
end

"""
How a dataset is opened. Fill it with mxt_dataset_options_init.
"""
struct mxt_dataset_options
    # Set by mxt_dataset_options_init.
    struct_size::Csize_t
    # One of mxt_token_type. Default MXT_TOKEN_TYPE_AUTO. For files without a header; a header is
    # believed. With another value than AUTO files are not refused for looking like text.
    token_type::Int32
    # Not used; must be 0.
    reserved::Int32
end

"""
What sequences of some length read of a dataset. Set struct_size to sizeof(mxt_coverage) before
the call that fills it.
"""
struct mxt_coverage
    # sizeof(mxt_coverage), set by the caller.
    struct_size::Csize_t
    # Windows of an epoch, of a sequence and one more token each; 0 where no file is long enough.
    windows::UInt64
    # Files of the dataset.
    files::UInt64
    # Files shorter than a window, which training never reads.
    short_files::UInt64
    # Tokens of all files.
    tokens::UInt64
    # Tokens of the files that training never reads.
    short_tokens::UInt64
    # Tokens of the shortest file. Sequences of one less read every file.
    shortest::UInt64
    # Tokens of the longest file.
    longest::UInt64
end

"""
What a trainer is made from. Fill it with mxt_trainer_options_init.
"""
struct mxt_trainer_options
    # Set by mxt_trainer_options_init.
    struct_size::Csize_t
    # Sequences that go through the model at once. Default 8.
    batch_size::Csize_t
    # Tokens of one sequence. 0 (default) takes the model's context length.
    sequence_length::Csize_t
    # Batches whose gradients are averaged into one optimizer step, those of all ranks of a group
    # together. 0 (default) takes as many as there are lanes, which without a group is 1.
    accumulation::Csize_t
    # Number formats of the linear layers: "fp32", "bf16", "fp8", "mxfp4-rht-sr", "nvidia-nvfp4" or
    # another name of docs/recipes.md (mxt_build_info lists them), which may be followed by switches
    # such as ",g=128". NULL (default) is "mxfp4-rht-sr". Borrowed for the call.
    recipe::Cstring
    # Decay of the first moment. Default 0.9.
    beta1::Cfloat
    # Decay of the second moment. Default 0.95.
    beta2::Cfloat
    # Added to the square root of the second moment; above 0. Default 1e-8.
    epsilon::Cfloat
    # Decoupled weight decay of tensors of two or more dimensions. Default 0.1.
    weight_decay::Cfloat
    # Largest global gradient norm; longer gradients are scaled down to it. 0 turns it off.
    # Default 1.
    clip::Cfloat
    # One of mxt_schedule. Default MXT_SCHEDULE_CONSTANT.
    schedule::Int32
    # Peak learning rate. Default 3e-4.
    lr::Cfloat
    # Learning rate at the end of the curve. Default 0.
    min_lr::Cfloat
    # Steps over which the rate rises linearly to lr. Default 0.
    warmup_steps::UInt64
    # Step at which the curve ends, counted from the trainer's first step or from where
    # mxt_trainer_set_schedule set the schedule; later steps keep min_lr. Must be above
    # warmup_steps, except for MXT_SCHEDULE_CONSTANT. Default 0.
    total_steps::UInt64
    # Length in steps of the descent of MXT_SCHEDULE_TRAPEZOID. Default 0.
    decay_steps::UInt64
    # What is computed again in the backward pass to save memory: "nothing" (the default, and what
    # NULL is), "pointwise" (outputs of norms and GELU: a third less for activations, little time)
    # or "block" (all but the inputs of blocks: a step takes up to a third longer). Results do not
    # depend on it. Borrowed for the call.
    recompute::Cstring
    # What moves the weights: "adamw" (the default, and what NULL is) or "stable-adamw" (AdamW
    # whose rate falls for a tensor whose gradients are larger than its second moment has seen
    # coming; it is made for a clip of 0, and helps most with a beta2 of 0.98 and above), or, only
    # with a clip of 0 and best with a beta2 of 0.999, "stable-spam" (gradients are normalized tensor by tensor, their outliers
    # clipped, moments start again every 1,000 steps: ",reset=1000"; with ",s=cosine"
    # beta1 and the decay of norms fall to half over total_steps, as the authors advise for language
    # models), "stable-spam-ref" (the same as
    # its authors' code counts) or "gradstab" (lengths of gradients alone); or "muon": the weights of
    # blocks' linear layers, each a matrix, move along their orthogonalized momentum (Keller Jordan,
    # "Muon: An optimizer for hidden layers in neural networks", 2024), and all else by AdamW. lr is
    # AdamW's rate, with beta1, beta2 and epsilon; matrices take lr times ",ratio=66.67" (the
    # reference's 0.02 over 3e-4), and weight decay times that; their momentum decays by
    # ",momentum=0.95", and is all that is kept of them. clip acts on all gradients, as ever (the
    # reference does not clip). Behind the name, with a comma, what its moments are kept in:
    # "moments=f32" (8 bytes a parameter, the default), "moments=bf16" (4) or "moments=int8" (2.25,
    # of the matrices of blocks; embeddings then have bf16): "adamw,moments=int8" ("muon" has half
    # of these bytes of matrices), or for comparison "moments=fp8" (3 of the matrices of blocks, 8 of
    # all else, as FP8-LM, arXiv 2310.18313, keeps them: E4M3 and fp16 with one scale a tensor, which
    # round more than "int8" does; "muon" has 1 of matrices); and what weights are kept as: "master=split" takes 2 bytes less
    # on a GPU than "master=f32", the default, and is not for recipes that need weights in f32;
    # and gradients: "gradients=bf16" takes 2 bytes less there for the matrices of blocks, rounds
    # them once, and wants an accumulation of 1. "adamw,ramping=500", only with a clip of 0,
    # updates weights less often that oscillate in the 4 bits of the forward pass ("tetrajet" and
    # its like; Q-Ramping, arXiv 2502.20853), which 30 steps find before every 500, and undo: such
    # a step takes as long; it takes 24 bytes a weight of blocks' linear layers and 12 a parameter
    # more, and no mxt_trainer_step_tokens. Borrowed for the call.
    optimizer::Cstring
    # How many tokens of each sequence the blocks between the first and the last see in training,
    # drawn anew for each block and step (random-LTD, arXiv 2211.11586): "start=128,steps=60%"
    # begins with 128 and comes to all of them after 60 % of total_steps, "start=128,steps=5000"
    # after 5,000 steps of the schedule. start is a multiple of 16. On the way they grow by a
    # sixteenth of a sequence at a time, or with ",by=N" by N, a multiple of 16, too. The last
    # third of the steps, or more, should see all tokens, as evaluations do. Needs 3 layers. NULL
    # (default) drops nothing. Borrowed for the call.
    token_drop::Cstring
    # Parts of a step that ranks of a group share, each of as many batches in a row, whose gradients
    # are then added in one fixed order: with the same lanes, losses, weights and files are the same
    # bits on any number of ranks that divides them by a power of two, and a run that is saved goes
    # on on any of these. 0 (default) takes as many as there are ranks. A rank with 2^k lanes keeps k
    # more copies of the gradients.
    lanes::Csize_t
    # The tensors that training leaves as they are, by patterns of their names with commas between
    # them: "transformer.wte.*,*.ln_*". '*' stands for any text, '?' for one character, `[ab]` for
    # one of some. They have no gradient and no state of the optimizer; a frozen matrix spares a
    # third of its products. A pattern that fits no name is an error. NULL (default) freezes
    # nothing. Borrowed for the call.
    frozen::Cstring
    # 1 keeps documents apart that end with the token `document_end`. Default 0.
    has_document_end::Int32
    # The token that ends a document, as 50256 does in GPT-2's vocabulary, with has_document_end: of
    # all windows and batches in which the host does not say which token is of which document,
    # attention looks at no document but a token's own, and positions are counted from where it
    # begins, so that packed documents are as if each were alone. Losses are of all targets as ever,
    # for weights say what counts. Saved with the run. Not with token_drop, nor a recipe with
    # "haste". Default 0.
    document_end::UInt32
end

"""
What one optimizer step did. Set struct_size to sizeof(mxt_step_stats) before the call that
fills it.
"""
struct mxt_step_stats
    # sizeof(mxt_step_stats), set by the caller.
    struct_size::Csize_t
    # Steps done since step 0, this one included.
    step::UInt64
    # Tokens trained on in this step.
    tokens::UInt64
    # Wall-clock duration of the step in seconds.
    seconds::Cdouble
    # Mean cross-entropy of the step's tokens before the update, in nats a token.
    loss::Cfloat
    # Global norm of the gradient before clipping.
    grad_norm::Cfloat
    # Learning rate of the step.
    lr::Cfloat
    # tokens / seconds.
    tokens_per_second::Cfloat
    # Blocks of 32 numbers of the step's MXFP4 operands whose scale was raised, because it lay too
    # far below the largest of its tensor for the format that the GPU multiplies in. Their
    # rounding is coarser than their own scale would allow; with stochastic rounding it has no
    # bias still. 0 on CPUs.
    raised_blocks::UInt64
    # Where mxt_trainer_watch_updates watches this step, the largest rms of a tensor (see
    # mxt_tensor_update), else NaN.
    update_rms_max::Cfloat
    # The index of that tensor for mxt_model_tensor_info, of equals the first; UINT32_MAX where
    # update_rms_max is NaN.
    update_rms_tensor::UInt32
    # Of `seconds`, those in which this rank waited for others, and exchanged gradients with them. 0
    # without a group.
    exchange_seconds::Cdouble
end

"""
What an evaluation found. Set struct_size to sizeof(mxt_eval_stats) before the call that fills
it.
"""
struct mxt_eval_stats
    # sizeof(mxt_eval_stats), set by the caller.
    struct_size::Csize_t
    # Tokens that were predicted.
    tokens::UInt64
    # Wall-clock duration in seconds.
    seconds::Cdouble
    # Mean cross-entropy in nats a token.
    loss::Cfloat
    # exp(loss).
    perplexity::Cfloat
    # Where mxt_trainer_set_sharpness asks for it, else NaN as the three below: 100 (f' - f) /
    # (1 + f) of the loss f and the largest that it can be, f', when each logit y moves by up to
    # sharpness_epsilon (|y| + 1).
    sharpness::Cfloat
    # The same of the last tokens of the sequences alone.
    sharpness_last::Cfloat
    # How far logits may move.
    sharpness_epsilon::Cfloat
    # Mean over the tokens of the largest magnitude of a logit.
    logit_amax::Cfloat
    # Where the recipe has "haste", else NaN as the one below: the part of the operations of the
    # linear layers' products that merging channels would spare, 0 to 1 (1 - K / C of C channels
    # in K buckets). Nothing is faster here: products are computed at their full width.
    spared_products::Cdouble
    # The same, less the operations that merging itself adds; below 0 where that is more.
    spared_all::Cdouble
end

"""
Bytes that a model with its trainer takes, by purpose. Set struct_size to
sizeof(mxt_memory_plan) before the call that fills it.
"""
struct mxt_memory_plan
    # sizeof(mxt_memory_plan), set by the caller.
    struct_size::Csize_t
    # Weights.
    weights::UInt64
    # Gradients.
    gradients::UInt64
    # What the optimizer keeps, such as moments.
    optimizer::UInt64
    # What the forward pass keeps for the backward pass, and the gradients that flow back.
    activations::UInt64
    # Packed operands and other scratch memory.
    workspace::UInt64
    # Sum of all.
    total::UInt64
    # Sums of lanes that are kept until others are added to them. 0 where a rank has one lane. What
    # ranks exchange takes up to 32 MiB of the host besides, which is not in the plan.
    exchange::UInt64
end

"""
Some rows of a batch on their way through a loss of the host's. Position t of sequence b is row
b * sequence_length + t.
"""
struct mxt_logits
    # sizeof(mxt_logits), set by the library.
    struct_size::Csize_t
    # (rows, vocab_size), row-major, in the host's memory: logits, to be replaced by the gradient of
    # each row's loss in them. Weights and divisor are not in it: the library multiplies.
    logits::Ptr{Cfloat}
    # (rows): the loss of each row, NaN before, to be written.
    losses::Ptr{Cfloat}
    # The number of the first row.
    first_row::UInt64
    # How many there are.
    rows::UInt64
    # Logits of a row.
    vocab_size::UInt64
end

"""
What a trainer learns from in one go: batch_size sequences of sequence_length positions, as the
trainer's options have them. Fill it with mxt_batch_init. Arrays have a number for each position,
sequence after sequence; they are borrowed for the call, and may lie in memory of the engine's GPU,
written before the call or on the engine's stream.
"""
struct mxt_batch
    # Set by mxt_batch_init.
    struct_size::Csize_t
    # Numbers in each array: batch_size * sequence_length.
    count::Csize_t
    # What the model reads.
    tokens::Ptr{UInt32}
    # What it is to predict at each position, or MXT_IGNORED. The next token, for a language model.
    # May be NULL with `loss`, which is of all positions then.
    targets::Ptr{UInt32}
    # A factor of each position's loss: 0 for what is not to be learned, as a prompt or padding.
    # NULL (default) is 1 for each.
    weights::Ptr{Cfloat}
    # What the sum of weighted losses is divided by, together with the divisors of the step's other
    # batches. 0 (default) is the sum of the weights of targets that are not ignored, so that the
    # step's loss is the mean over what counts. Weights that may be below 0, as advantages are, need
    # another one, such as `count`.
    divisor::Cdouble
    # Where the loss of each position is written, without its weight, 0 where the target is ignored;
    # or NULL (default).
    losses::Ptr{Cfloat}
    # In place of cross-entropy, or NULL (default).
    loss::mxt_loss_fn
    # Passed to `loss`.
    user_data::Ptr{Cvoid}
    # The number of the document that each token is of. Where it changes along a sequence another
    # document begins: attention looks at no document but a token's own, and positions are counted
    # from where it begins, so that each has the logits that it has alone. What is predicted across
    # an end counts unless its target is ignored or its weight is 0. Not with a token_drop or a
    # recipe with "haste". The first batch with more than one document in a sequence allocates 8
    # bytes a token. NULL (default) takes document_end of the trainer's options or, without it,
    # each sequence as one document.
    documents::Ptr{UInt32}
end

"""
The host's functions for the files of a checkpoint. Fill it with mxt_file_callbacks_init.

They run on the thread that is inside the call that loads or saves, in which only that call uses
them. They may call the library, but calls on the mxt_files, on the trainer that is saved, and
such as would change the model that is saved, return MXT_ERROR_BUSY. They must not throw or
longjmp.
"""
struct mxt_file_callbacks
    # Set by mxt_file_callbacks_init.
    struct_size::Csize_t
    # Passed to the functions below. It must stay valid until `user_data_free` is called with it.
    user_data::Ptr{Cvoid}
    # Opens a file. NULL (default): nothing can be loaded.
    open::mxt_file_open_fn
    # Reads a piece of a file. Must be there where `open` is.
    read::mxt_file_read_fn
    # Closes a file. Must be there.
    close::mxt_file_close_fn
    # Begins a save, or NULL (default) where nothing is to be done then.
    begin_::mxt_files_begin_fn
    # Begins a file of a save. NULL (default): nothing can be saved.
    create::mxt_file_create_fn
    # Writes a piece of a file. Must be there where `create` is.
    write::mxt_file_write_fn
    # Ends a save that has succeeded. Must be there where `create` is.
    commit::mxt_files_commit_fn
    # Ends a save that has failed. Must be there where `create` is.
    abort::mxt_files_abort_fn
    # Says why a function failed, or NULL (default): messages have the number that it returned.
    error::mxt_files_error_fn
    # Called with `user_data`, whatever it is, exactly once for each call of
    # mxt_files_from_callbacks that succeeds, when the library will never call the functions above
    # again: at the end of mxt_files_free, or of the call that still uses the files then. A
    # mxt_files_from_callbacks that fails never calls it: user_data is the caller's still. NULL
    # (default): nothing is called.
    user_data_free::mxt_user_data_free_fn
end

"""
What an update did to a tensor. Set struct_size to sizeof(mxt_tensor_update) before the call
that fills it.
"""
struct mxt_tensor_update
    # sizeof(mxt_tensor_update), set by the caller.
    struct_size::Csize_t
    # The step that made it, from 1 on.
    step::UInt64
    # Norm of the tensor's gradient, before clipping and normalization.
    grad_norm::Cfloat
    # How far the gradient is beyond what the second moment has seen coming: root of the mean of
    # g^2 / max(u, epsilon^2) over the tensor's numbers, where g is the gradient that the moments
    # take in and u the corrected second moment after that. 1 while gradients stay as they were,
    # and never above 1 / sqrt(1 - beta2); 2.3 and above in the first layers comes before most
    # spikes of the loss (arXiv 2304.13013). NaN of a tensor that has no second moment, as the
    # matrices of "muon".
    rms::Cfloat
end

"""
How weights changed over a window of steps, and what they are rounded to in the forward pass.
Set struct_size to sizeof(mxt_weight_metrics) before the call that fills it.
"""
struct mxt_weight_metrics
    # sizeof(mxt_weight_metrics), set by the caller.
    struct_size::Csize_t
    # The last step of the window.
    step::UInt64
    # Steps of the window.
    steps::UInt64
    # Mean over the steps of |W - W before| / |W before|, Frobenius norms.
    change::Cdouble
    # The same of the rounded weights.
    rounded_change::Cdouble
    # Mean over the steps of the share of weights whose codes changed, 0 to 1.
    flipped::Cdouble
    # Mean over the weights, after the last step, of their distance from the nearest threshold at
    # which their code changes, over the largest such distance of any weight with that code.
    confidence::Cdouble
    # Share of weights whose rounded numbers moved more than 16 times as far as themselves, in the
    # whole window.
    oscillating::Cdouble
    # Share of weights above the largest number of their blocks, after the last step.
    clipped::Cdouble
    # The largest magnitude of a weight after the last step.
    amax::Cfloat
    # Number of tensors that this is of: 1, or all that are watched.
    tensors::UInt32
end

"""
What mxt_trainer_run does. Fill it with mxt_run_options_init.
"""
struct mxt_run_options
    # Set by mxt_run_options_init.
    struct_size::Csize_t
    # Steps to do in this call. Default 0.
    steps::UInt64
    # Data to evaluate on, or NULL (default). Borrowed for the call.
    eval_dataset::Ptr{mxt_dataset}
    # Evaluates whenever the number of steps done is a multiple of it, and after the last step.
    # 0 (default): after the last step only.
    eval_every::UInt64
    # Most batches of one evaluation. 0 takes all of the dataset. Default 20.
    eval_batches::Csize_t
    # Folder for the checkpoint, or NULL (default). Borrowed for the call.
    save_dir::Cstring
    # Saves whenever the number of steps done is a multiple of it, and at the end of the run,
    # however it ends; there once more where on_step may have changed the trainer or its model
    # since, by any call that needs them for itself.
    # 0 (default): at the end only.
    save_every::UInt64
    # Sees every step, or NULL (default).
    on_step::mxt_step_fn
    # Passed to on_step.
    user_data::Ptr{Cvoid}
    # Files for the checkpoint in place of save_dir, or NULL (default). Borrowed for the call.
    # They are in use only inside each checkpoint, not while the callback runs, which may free them:
    # the run has them until it ends.
    save_files::Ptr{mxt_files}
end

"""
What a run did. Set struct_size to sizeof(mxt_run_result) before the call that fills it.
"""
struct mxt_run_result
    # sizeof(mxt_run_result), set by the caller.
    struct_size::Csize_t
    # Steps done in this call.
    steps::UInt64
    # Tokens trained on in this call.
    tokens::UInt64
    # Seconds spent in steps, without evaluations, checkpoints and callbacks.
    seconds::Cdouble
    # Loss of the last step, NaN if there was none.
    last_loss::Cfloat
    # Loss of the last evaluation that did not fail, NaN if there was none.
    last_eval_loss::Cfloat
    # One of mxt_run_end.
    end_::Int32
    # 1 if save_dir or save_files holds the trainer as it is now, else 0.
    saved::Int32
    # Evaluations of this call that failed. The log has their messages.
    eval_errors::UInt64
    # Checkpoints of this call that could not be saved. The log has their messages.
    save_errors::UInt64
end

"""
    mxt_status_string(status)

A short English text for a status code, such as \"busy\". The text of a code that this library
does not know is \"unknown status\". For what went wrong in particular read mxt_last_error.

Never NULL; the text is static. Any thread may call it at any time.
"""
function mxt_status_string(status)
    return @ccall libmxfp4train.mxt_status_string(status::mxt_status)::Cstring
end

"""
    mxt_version()

The version of the library that is running, such as \"0.1.0\".

Never NULL; the text is static. Any thread may call it at any time.
"""
function mxt_version()
    return @ccall libmxfp4train.mxt_version()::Cstring
end

"""
    mxt_version_number()

The version of the library that is running; compare with MXT_VERSION_NUMBER, the version of the
header that the program was compiled with.

Any thread may call it at any time.
"""
function mxt_version_number()
    return @ccall libmxfp4train.mxt_version_number()::UInt32
end

"""
    mxt_abi_version()

The binary interface of the library that is running. A program that loads the library at run
time must not go on if this is not MXT_ABI_VERSION.

Any thread may call it at any time.
"""
function mxt_abi_version()
    return @ccall libmxfp4train.mxt_abi_version()::UInt32
end

"""
    mxt_build_info()

What this build is, as a JSON object: \"version\", \"abi\", \"commit\" (null in debug builds and if
not known), \"target\", \"profile\", \"devices\" (the kinds that it can drive), \"recipes\", and
\"kernels\" with the instruction sets that are \"compiled\", those that this processor has
(\"available\") and the one that an engine takes (\"selected\"). Later versions may add keys.

Never NULL; the text is static. Any thread may call it at any time.
"""
function mxt_build_info()
    return @ccall libmxfp4train.mxt_build_info()::Cstring
end

"""
    mxt_last_error()

The message of the last call of this thread that failed: what was expected, what came, and the
fix where one is known, with the name of the function in front. Every failing call leaves its
message here; calls with a handle leave it on the handle too (mxt_trainer_last_error and the
like). Calls that succeed leave it as it is. The empty string when no call has failed yet.

Never NULL; UTF-8; cut off after 1,023 bytes. The text belongs to the calling thread and stays
valid until that thread's next call that fails, or its end. Any thread may call it at any time.
"""
function mxt_last_error()
    return @ccall libmxfp4train.mxt_last_error()::Cstring
end

"""
    mxt_group_init(group, struct_size)

Fills `group` with the defaults. `struct_size` is sizeof(mxt_group) as the caller's compiler sees
it.

Errors: MXT_ERROR_NULL, MXT_ERROR_STRUCT_SIZE.
"""
function mxt_group_init(group, struct_size)
    return @ccall libmxfp4train.mxt_group_init(
        group::Ptr{mxt_group},
        struct_size::Csize_t
    )::mxt_status
end

"""
    mxt_engine_options_init(options, struct_size)

Fills `options` with the defaults. `struct_size` is sizeof(mxt_engine_options) as the caller's
compiler sees it, so that an older program is not written past the end of its struct.

Errors: MXT_ERROR_NULL, MXT_ERROR_STRUCT_SIZE.
"""
function mxt_engine_options_init(options, struct_size)
    return @ccall libmxfp4train.mxt_engine_options_init(
        options::Ptr{mxt_engine_options},
        struct_size::Csize_t
    )::mxt_status
end

"""
    mxt_engine_new(options, engine)

Starts an engine and stores it in `*engine`, for the caller to free with mxt_engine_free.

`options` may be NULL for the defaults, and is not read after the call.

Errors: MXT_ERROR_NULL, MXT_ERROR_STRUCT_SIZE, MXT_ERROR_UTF8, MXT_ERROR_INVALID_ARGUMENT (an
unknown device, too many threads, a stream of another device), MXT_ERROR_OUT_OF_MEMORY (for the
threads; use fewer), MXT_ERROR_UNSUPPORTED (threads that the system does not start, a device
that is not there, or whose driver, NVRTC or cuBLASLt is missing; the message says what to
install), MXT_ERROR_DEVICE (a GPU that fails); with a group MXT_ERROR_MISMATCH (ranks of other
versions, seeds or chips) and MXT_ERROR_PEER. The message is in mxt_last_error.

A GPU's kernels are compiled when a chip is met for the first time (some seconds) and kept in
the user's cache folder: \$MXT_CACHE_DIR, else mxfp4train in \$XDG_CACHE_HOME or ~/.cache. Only
absolute names count. A folder that belongs to another user, or that others may write, is not
used: kernels are compiled every time then, and the log warns.

In the second step of a trainer on a GPU the library captures a CUDA graph, for some
milliseconds. A call that waits for the whole device then, as cudaDeviceSynchronize does, may
get an error from CUDA: a host with CUDA code on other threads waits for its streams instead.
Should a capture be broken off, the step is done without, and the next one tries again.
"""
function mxt_engine_new(options, engine)
    return @ccall libmxfp4train.mxt_engine_new(
        options::Ptr{mxt_engine_options},
        engine::Ptr{Ptr{mxt_engine}}
    )::mxt_status
end

"""
    mxt_engine_memory(engine, memory)

Stores how much large memory `engine`, and all that was made from it, has in use in `*memory`,
whose struct_size the caller has set. Any thread may call it at any time.

Errors: MXT_ERROR_NULL, MXT_ERROR_STRUCT_SIZE.
"""
function mxt_engine_memory(engine, memory)
    return @ccall libmxfp4train.mxt_engine_memory(
        engine::Ptr{mxt_engine},
        memory::Ptr{mxt_memory_use}
    )::mxt_status
end

"""
    mxt_engine_device(engine)

The name of the device: \"cpu\", or \"cuda:0\" for the first GPU. NULL if `engine` is NULL.

The text is valid as long as the engine. Any thread may call it at any time.
"""
function mxt_engine_device(engine)
    return @ccall libmxfp4train.mxt_engine_device(engine::Ptr{mxt_engine})::Cstring
end

"""
    mxt_engine_threads(engine)

Number of worker threads: those of the CPU, 0 for a GPU. 0 if `engine` is NULL. Any thread may
call it at any time.
"""
function mxt_engine_threads(engine)
    return @ccall libmxfp4train.mxt_engine_threads(engine::Ptr{mxt_engine})::Csize_t
end

"""
    mxt_engine_seed(engine)

The seed that models and trainers of this engine start from. 0 if `engine` is NULL. Any thread
may call it at any time.
"""
function mxt_engine_seed(engine)
    return @ccall libmxfp4train.mxt_engine_seed(engine::Ptr{mxt_engine})::UInt64
end

"""
    mxt_engine_rank(engine)

Which rank of its group an engine is, from 0 on; 0 without a group, and if `engine` is NULL. Any
thread may call it at any time.
"""
function mxt_engine_rank(engine)
    return @ccall libmxfp4train.mxt_engine_rank(engine::Ptr{mxt_engine})::Csize_t
end

"""
    mxt_engine_ranks(engine)

Ranks of an engine's group; 1 without one, 0 if `engine` is NULL. Any thread may call it at any
time.
"""
function mxt_engine_ranks(engine)
    return @ccall libmxfp4train.mxt_engine_ranks(engine::Ptr{mxt_engine})::Csize_t
end

"""
    mxt_engine_last_error(engine)

The message of the last call with this engine that failed (making a model from it, for one), on
whichever thread; the empty string when there is none.

Never NULL. The text belongs to the calling thread and stays valid until that thread's next
call of mxt_engine_last_error. Any thread may call it at any time.
"""
function mxt_engine_last_error(engine)
    return @ccall libmxfp4train.mxt_engine_last_error(engine::Ptr{mxt_engine})::Cstring
end

"""
    mxt_engine_free(engine)

Gives the engine up; NULL does nothing. Models and trainers that were made from it stay usable:
the worker threads end with the last of them.
"""
function mxt_engine_free(engine)
    return @ccall libmxfp4train.mxt_engine_free(engine::Ptr{mxt_engine})::Cvoid
end

"""
    mxt_model_config_init(config, struct_size)

Fills `config` with the defaults. `struct_size` is sizeof(mxt_model_config) as the caller's
compiler sees it.

Errors: MXT_ERROR_NULL, MXT_ERROR_STRUCT_SIZE.
"""
function mxt_model_config_init(config, struct_size)
    return @ccall libmxfp4train.mxt_model_config_init(
        config::Ptr{mxt_model_config},
        struct_size::Csize_t
    )::mxt_status
end

"""
    mxt_model_new(engine, config, model)

Makes a model with random initial weights, as GPT-2's, drawn from the engine's seed, and stores it
in `*model` for the caller to free.

Errors: MXT_ERROR_NULL, MXT_ERROR_STRUCT_SIZE, MXT_ERROR_INVALID_ARGUMENT (names the field),
MXT_ERROR_OUT_OF_MEMORY. The message is in mxt_last_error and on the engine.
"""
function mxt_model_new(engine, config, model)
    return @ccall libmxfp4train.mxt_model_new(
        engine::Ptr{mxt_engine},
        config::Ptr{mxt_model_config},
        model::Ptr{Ptr{mxt_model}}
    )::mxt_status
end

"""
    mxt_model_load(engine, dir, model)

Loads the model of a checkpoint folder, written by this library or by Hugging Face transformers
(gpt2, llama, mistral, qwen2 or qwen3), and stores it in `*model` for the caller to free. Weights
are safetensors in 16, 32 or 64 bits, in one file or in several with an index; a head that differs
from the embedding stays one of its own.

Errors: MXT_ERROR_NULL, MXT_ERROR_INVALID_ARGUMENT, MXT_ERROR_IO,
MXT_ERROR_FORMAT (a damaged file; names the tensor), MXT_ERROR_MISMATCH, MXT_ERROR_NOT_FINITE (a
weight in a file), MXT_ERROR_OUT_OF_MEMORY. The message is in mxt_last_error and on the engine.
"""
function mxt_model_load(engine, dir, model)
    return @ccall libmxfp4train.mxt_model_load(
        engine::Ptr{mxt_engine},
        dir::Cstring,
        model::Ptr{Ptr{mxt_model}}
    )::mxt_status
end

"""
    mxt_model_save(model, dir)

Saves weights and configuration as a folder that Hugging Face transformers opens. The folder is
made if it is not there. A failure, or a kill at any instant, leaves a whole
checkpoint there, the one before or the new one. Whatever else is in the folder stays, and so do
keys of the configuration that a loaded model came with, such as special tokens.

Errors: MXT_ERROR_NULL, MXT_ERROR_INVALID_ARGUMENT, MXT_ERROR_IO, MXT_ERROR_FORMAT (a file, or a
folder that holds other things and no checkpoint), MXT_ERROR_NOT_FINITE (a weight),
MXT_ERROR_BUSY.
"""
function mxt_model_save(model, dir)
    return @ccall libmxfp4train.mxt_model_save(
        model::Ptr{mxt_model},
        dir::Cstring
    )::mxt_status
end

"""
    mxt_model_with_lora(model, rank, alpha, layers, adapted)

Makes a model with the weights of `model`, which stays as it is, and adapters beside its linear
layers (LoRA: x A^T B^T, times alpha / rank, is added to a layer's result), and stores it in
`*adapted` for the caller to free. A trainer of it trains the adapters alone and has gradients and
states of nothing else. A, \"NAME.lora_A.weight\" (rank, in), is drawn from the engine's seed; B,
\"NAME.lora_B.weight\" (out, rank), is 0, so that it computes what `model` does. `alpha` is 0 for
twice the rank; `layers` are some of mxt_lora_layer, 0 for all. Both models take memory.

Errors: MXT_ERROR_NULL, MXT_ERROR_INVALID_ARGUMENT (a rank of 0, or a model that has adapters),
MXT_ERROR_OUT_OF_MEMORY, MXT_ERROR_BUSY.
"""
function mxt_model_with_lora(model, rank, alpha, layers, adapted)
    return @ccall libmxfp4train.mxt_model_with_lora(
        model::Ptr{mxt_model},
        rank::Csize_t,
        alpha::Cfloat,
        layers::UInt32,
        adapted::Ptr{Ptr{mxt_model}}
    )::mxt_status
end

"""
    mxt_model_merge_lora(model, merged)

Makes a model of the weights of `model`, which stays as it is, with its adapters added to them, and
stores it in `*merged` for the caller to free.

Errors: MXT_ERROR_NULL, MXT_ERROR_INVALID_ARGUMENT (a model without adapters),
MXT_ERROR_NOT_FINITE (a sum beyond f32), MXT_ERROR_OUT_OF_MEMORY, MXT_ERROR_BUSY.
"""
function mxt_model_merge_lora(model, merged)
    return @ccall libmxfp4train.mxt_model_merge_lora(
        model::Ptr{mxt_model},
        merged::Ptr{Ptr{mxt_model}}
    )::mxt_status
end

"""
    mxt_model_save_lora(model, dir)

Saves the adapters of a model alone, as a folder that PEFT opens beside the model that they were
made for: adapter_config.json and adapter_model.safetensors. As atomic as mxt_model_save.

Errors: those of mxt_model_save; MXT_ERROR_INVALID_ARGUMENT also for a model without adapters.
"""
function mxt_model_save_lora(model, dir)
    return @ccall libmxfp4train.mxt_model_save_lora(
        model::Ptr{mxt_model},
        dir::Cstring
    )::mxt_status
end

"""
    mxt_model_load_lora(model, dir, adapted)

mxt_model_with_lora of adapters that PEFT or mxt_model_save_lora saved: LoRA of one rank, without
DoRA, biases or further modules, the same in all blocks.

Errors: MXT_ERROR_NULL, MXT_ERROR_INVALID_ARGUMENT (a model that has adapters), MXT_ERROR_IO,
MXT_ERROR_FORMAT (names the key or the tensor), MXT_ERROR_MISMATCH (adapters of another model),
MXT_ERROR_NOT_FINITE, MXT_ERROR_OUT_OF_MEMORY, MXT_ERROR_BUSY.
"""
function mxt_model_load_lora(model, dir, adapted)
    return @ccall libmxfp4train.mxt_model_load_lora(
        model::Ptr{mxt_model},
        dir::Cstring,
        adapted::Ptr{Ptr{mxt_model}}
    )::mxt_status
end

"""
    mxt_model_save_as(model, dir, weights)

mxt_model_save of weights that are stored as other numbers, for programs that run the model:
training that goes on from them begins with what they were rounded to. `weights` is one of
mxt_stored_weights. In MXFP4 only mxt_model_load reads them, as f32 numbers of which a decoder in
MXFP4 makes the codes of the file again.

Errors: those of mxt_model_save; MXT_ERROR_INVALID_ARGUMENT also for a number that is beyond the
format, which it names.
"""
function mxt_model_save_as(model, dir, weights)
    return @ccall libmxfp4train.mxt_model_save_as(
        model::Ptr{mxt_model},
        dir::Cstring,
        weights::Int32
    )::mxt_status
end

"""
    mxt_model_get_config(model, config)

Stores the model's shape in `*config`, whose struct_size the caller has set.

Errors: MXT_ERROR_NULL, MXT_ERROR_STRUCT_SIZE.
"""
function mxt_model_get_config(model, config)
    return @ccall libmxfp4train.mxt_model_get_config(
        model::Ptr{mxt_model},
        config::Ptr{mxt_model_config}
    )::mxt_status
end

"""
    mxt_model_parameter_count(model)

Numbers in all tensors, those of adapters among them. 0 if `model` is NULL. Any thread may call it at any time.
"""
function mxt_model_parameter_count(model)
    return @ccall libmxfp4train.mxt_model_parameter_count(model::Ptr{mxt_model})::UInt64
end

"""
    mxt_model_tensor_count(model)

Number of tensors. 0 if `model` is NULL. Any thread may call it at any time.
"""
function mxt_model_tensor_count(model)
    return @ccall libmxfp4train.mxt_model_tensor_count(model::Ptr{mxt_model})::Csize_t
end

"""
    mxt_model_tensor_info(model, index, info)

Stores name and shape of tensor `index` (0 to mxt_model_tensor_count - 1) in `*info`, whose
struct_size the caller has set.

Errors: MXT_ERROR_NULL, MXT_ERROR_STRUCT_SIZE, MXT_ERROR_INVALID_ARGUMENT (no such index).
"""
function mxt_model_tensor_info(model, index, info)
    return @ccall libmxfp4train.mxt_model_tensor_info(
        model::Ptr{mxt_model},
        index::Csize_t,
        info::Ptr{mxt_tensor_info}
    )::mxt_status
end

"""
    mxt_model_tensor_read(model, name, values, count)

Copies tensor `name` into `values`, row-major; or, of one that files have in parts, a part by its
name there, such as \"model.layers.0.self_attn.q_proj.weight\". `count` is the number of floats that
`values` has room for and must be the tensor's element_count, or the part's. `values`
may lie in memory of the engine's GPU.

Errors: MXT_ERROR_NULL, MXT_ERROR_UTF8, MXT_ERROR_NO_SUCH_TENSOR, MXT_ERROR_INVALID_ARGUMENT (a
wrong count), MXT_ERROR_BUSY.
"""
function mxt_model_tensor_read(model, name, values, count)
    return @ccall libmxfp4train.mxt_model_tensor_read(
        model::Ptr{mxt_model},
        name::Cstring,
        values::Ptr{Cfloat},
        count::Csize_t
    )::mxt_status
end

"""
    mxt_model_tensor_write(model, name, values, count)

Overwrites tensor `name`, or a part of one, with `values`, as mxt_model_tensor_read has them.
`count` is the number of floats in `values` and must be the tensor's element_count, or the part's.
The moments of a trainer of this model stay as they are.
`values` may lie in memory of the engine's GPU.

Errors: MXT_ERROR_NULL, MXT_ERROR_UTF8, MXT_ERROR_NO_SUCH_TENSOR, MXT_ERROR_INVALID_ARGUMENT (a
wrong count), MXT_ERROR_NOT_FINITE, MXT_ERROR_BUSY.
"""
function mxt_model_tensor_write(model, name, values, count)
    return @ccall libmxfp4train.mxt_model_tensor_write(
        model::Ptr{mxt_model},
        name::Cstring,
        values::Ptr{Cfloat},
        count::Csize_t
    )::mxt_status
end

"""
    mxt_model_last_error(model)

The message of the last call with this handle that failed, on whichever thread; the empty string
when there is none.

Never NULL. The text belongs to the calling thread and stays valid until that thread's next
call of mxt_model_last_error. Any thread may call it at any time.
"""
function mxt_model_last_error(model)
    return @ccall libmxfp4train.mxt_model_last_error(model::Ptr{mxt_model})::Cstring
end

"""
    mxt_model_free(model)

Gives the handle up; NULL does nothing. Trainers of the model stay usable, and so do other
handles: the weights go with the last of them.
"""
function mxt_model_free(model)
    return @ccall libmxfp4train.mxt_model_free(model::Ptr{mxt_model})::Cvoid
end

"""
    mxt_generate_options_init(options, struct_size)

Fills `options` with the defaults. `struct_size` is sizeof(mxt_generate_options) as the caller's
compiler sees it.

Errors: MXT_ERROR_NULL, MXT_ERROR_STRUCT_SIZE.
"""
function mxt_generate_options_init(options, struct_size)
    return @ccall libmxfp4train.mxt_generate_options_init(
        options::Ptr{mxt_generate_options},
        struct_size::Csize_t
    )::mxt_status
end

"""
    mxt_model_generate(model, options, prompt, prompt_count, tokens, capacity, written)

Samples a continuation of the `prompt_count` tokens of `prompt`, at least one. The new tokens
(without the prompt) go to `tokens`, their number to `*written`.

`options` may be NULL for the defaults. `capacity` is the number of tokens that `tokens` has
room for, at least max_tokens of the options; with `tokens` NULL and `capacity` 0 the new tokens
go to on_token only.

Errors: MXT_ERROR_NULL, MXT_ERROR_STRUCT_SIZE, MXT_ERROR_BUFFER_TOO_SMALL,
MXT_ERROR_INVALID_ARGUMENT (an empty prompt, a negative temperature, a stop token outside the
vocabulary and the like),
MXT_ERROR_TOKEN_RANGE, MXT_ERROR_NOT_FINITE, MXT_ERROR_UNSUPPORTED (what the device cannot do),
MXT_ERROR_OUT_OF_MEMORY, MXT_ERROR_BUSY.
"""
function mxt_model_generate(model, options, prompt, prompt_count, tokens, capacity, written)
    return @ccall libmxfp4train.mxt_model_generate(
        model::Ptr{mxt_model},
        options::Ptr{mxt_generate_options},
        prompt::Ptr{UInt32},
        prompt_count::Csize_t,
        tokens::Ptr{UInt32},
        capacity::Csize_t,
        written::Ptr{Csize_t}
    )::mxt_status
end

"""
    mxt_model_next_logits(model, tokens, token_count, logits, count)

Computes the logits of the token after the `token_count` tokens of `tokens`, at least one, in
f32. Of more tokens than the context holds, the last ones count. `logits` has room for `count`
numbers, which must be the model's vocab_size. Both arrays may lie in memory of the engine's
GPU.

Errors: MXT_ERROR_NULL, MXT_ERROR_INVALID_ARGUMENT (no token, another count),
MXT_ERROR_TOKEN_RANGE, MXT_ERROR_UNSUPPORTED (what the device cannot do),
MXT_ERROR_OUT_OF_MEMORY, MXT_ERROR_BUSY.
"""
function mxt_model_next_logits(model, tokens, token_count, logits, count)
    return @ccall libmxfp4train.mxt_model_next_logits(
        model::Ptr{mxt_model},
        tokens::Ptr{UInt32},
        token_count::Csize_t,
        logits::Ptr{Cfloat},
        count::Csize_t
    )::mxt_status
end

"""
    mxt_model_score(model, weights, tokens, token_count, lengths, text_count, log_probabilities, hidden)

Writes the log-probability of every token of `text_count` texts, after those before it in its own
text; that of the first, before which there is none, as 0, so that those of a text add up to that of
all the rest. Their negative mean is the loss. Nothing but the model is needed, and nothing is kept.

`tokens` are those of all texts, one behind the other, `token_count` in all, and `lengths` how many
each has: 0 up to the model's context_length. Arrays may be NULL where they have no elements.
`log_probabilities` has room for token_count numbers. On a processor they are those of each text
alone, bit for bit. `hidden` is NULL, or has room for token_count times the model's channels: what
the norm behind the last block puts out at every token, (tokens, channels), from which the head
makes logits. `weights` is MXT_DECODER_WEIGHTS_F32, on a GPU slow, or MXT_DECODER_WEIGHTS_BF16, which
a processor computes as the former. Arrays may lie in memory of the engine's GPU, but for `lengths`.
In a group of ranks the call is a rank's own.

Errors: MXT_ERROR_NULL, MXT_ERROR_INVALID_ARGUMENT (lengths that do not add up to token_count, a
text beyond the context, other weights), MXT_ERROR_TOKEN_RANGE, MXT_ERROR_UNSUPPORTED (what the
device cannot do), MXT_ERROR_OUT_OF_MEMORY, MXT_ERROR_BUSY.
"""
function mxt_model_score(model, weights, tokens, token_count, lengths, text_count, log_probabilities, hidden)
    return @ccall libmxfp4train.mxt_model_score(
        model::Ptr{mxt_model},
        weights::Int32,
        tokens::Ptr{UInt32},
        token_count::Csize_t,
        lengths::Ptr{Csize_t},
        text_count::Csize_t,
        log_probabilities::Ptr{Cfloat},
        hidden::Ptr{Cfloat}
    )::mxt_status
end

"""
    mxt_decoder_options_init(options, struct_size)

Fills `options` with the defaults. `struct_size` is sizeof(mxt_decoder_options) as the caller's
compiler sees it.

Errors: MXT_ERROR_NULL, MXT_ERROR_STRUCT_SIZE.
"""
function mxt_decoder_options_init(options, struct_size)
    return @ccall libmxfp4train.mxt_decoder_options_init(
        options::Ptr{mxt_decoder_options},
        struct_size::Csize_t
    )::mxt_status
end

"""
    mxt_decoder_new(model, options, decoder)

Makes a decoder of empty texts of `model` and stores it in `*decoder` for the caller to free. Its
memory is allocated here: keys and values, 8 bytes a channel, block and token of room (4 where a GPU
computes in bf16), a copy of the linear layers' weights, in less than f32 of the head's, too (on a
GPU in MXFP4 alone), one more in MXFP4 with drafts, and what a pass of some hundred tokens takes. On a GPU the driver takes besides
what a recorded pass of each text does, and where a trainer changes what weights are kept as, all may
be allocated again. `options` may be NULL for the defaults. The handle `model` stays the caller's,
and may be freed first.

Errors: MXT_ERROR_NULL, MXT_ERROR_STRUCT_SIZE, MXT_ERROR_INVALID_ARGUMENT (names the option),
MXT_ERROR_UNSUPPORTED (what the device cannot do), MXT_ERROR_OUT_OF_MEMORY, MXT_ERROR_BUSY. The
message is in mxt_last_error and on the model.
"""
function mxt_decoder_new(model, options, decoder)
    return @ccall libmxfp4train.mxt_decoder_new(
        model::Ptr{mxt_model},
        options::Ptr{mxt_decoder_options},
        decoder::Ptr{Ptr{mxt_decoder}}
    )::mxt_status
end

"""
    mxt_decoder_push(decoder, sequence, tokens, count)

Appends the `count` tokens of `tokens` to text `sequence`. They are computed when logits are asked
for. `tokens` may lie in memory of the engine's GPU.

Errors: MXT_ERROR_NULL, MXT_ERROR_INVALID_ARGUMENT (no such sequence, more tokens than there is
room for), MXT_ERROR_TOKEN_RANGE, MXT_ERROR_BUSY; the text is then as before.
"""
function mxt_decoder_push(decoder, sequence, tokens, count)
    return @ccall libmxfp4train.mxt_decoder_push(
        decoder::Ptr{mxt_decoder},
        sequence::Csize_t,
        tokens::Ptr{UInt32},
        count::Csize_t
    )::mxt_status
end

"""
    mxt_decoder_logits(decoder, sequence, logits, count)

Computes the logits of the token after the last one of text `sequence`, which has at least one.
`logits` has room for `count` numbers, which must be the model's vocab_size, and may lie in memory
of the engine's GPU.

In f32 they are those of mxt_model_next_logits of all tokens of the text: on a processor bit for
bit. In any numbers they are the same bits however the tokens came.

Errors: MXT_ERROR_NULL, MXT_ERROR_INVALID_ARGUMENT (no such sequence, no token, another count),
MXT_ERROR_OUT_OF_MEMORY (on a GPU, where a trainer has changed what weights are kept as),
MXT_ERROR_BUSY (also while the model is being trained).
"""
function mxt_decoder_logits(decoder, sequence, logits, count)
    return @ccall libmxfp4train.mxt_decoder_logits(
        decoder::Ptr{mxt_decoder},
        sequence::Csize_t,
        logits::Ptr{Cfloat},
        count::Csize_t
    )::mxt_status
end

"""
    mxt_decoder_logits_from(decoder, sequence, from, logits, count)

Computes the logits of what comes after each token of text `sequence` from number `from` on, as
mxt_decoder_logits has them after each: what it takes to score a text, or to check tokens that were
guessed. With n such tokens, `logits` has room for `count` numbers, which must be n times the
model's vocab_size, and may lie in memory of the engine's GPU. All n are computed together, again if
they were before.

Errors: MXT_ERROR_NULL, MXT_ERROR_INVALID_ARGUMENT (no such sequence or token, another count),
MXT_ERROR_OUT_OF_MEMORY (on a GPU, where a trainer has changed what weights are kept as),
MXT_ERROR_BUSY (also while the model is being trained).
"""
function mxt_decoder_logits_from(decoder, sequence, from, logits, count)
    return @ccall libmxfp4train.mxt_decoder_logits_from(
        decoder::Ptr{mxt_decoder},
        sequence::Csize_t,
        from::Csize_t,
        logits::Ptr{Cfloat},
        count::Csize_t
    )::mxt_status
end

"""
    mxt_decoder_logits_of(decoder, sequences, sequence_count, logits, count)

Computes the logits of the tokens after the last ones of the `sequence_count` different texts of
`sequences`, those of mxt_decoder_logits of each. The last tokens of 32 texts at a time share a look
at the weights; what is missing before them is computed text by text. `logits` has room for `count` numbers, which must be sequence_count times the model's vocab_size, and may lie in
memory of the engine's GPU.

Errors: MXT_ERROR_NULL, MXT_ERROR_INVALID_ARGUMENT (no such sequence, one that comes twice or has no
token, another count), MXT_ERROR_OUT_OF_MEMORY, MXT_ERROR_BUSY (also while the model is being
trained).
"""
function mxt_decoder_logits_of(decoder, sequences, sequence_count, logits, count)
    return @ccall libmxfp4train.mxt_decoder_logits_of(
        decoder::Ptr{mxt_decoder},
        sequences::Ptr{Csize_t},
        sequence_count::Csize_t,
        logits::Ptr{Cfloat},
        count::Csize_t
    )::mxt_status
end

"""
    mxt_decoder_generate_each(decoder, sequences, sequence_count, options, tokens, capacity, written)

mxt_decoder_generate of `sequence_count` different texts at once, which read the weights together.
The first has the seed of the options, each other one the next; so each is what it would be alone.
New tokens of text number i of `sequences` are written to `tokens` from number i * `capacity` on,
where there is room for `capacity` of each, at least max_tokens; their number to number i of
`written`.

Errors: those of mxt_decoder_generate and mxt_decoder_logits_of; MXT_ERROR_INVALID_ARGUMENT also for
a draft and for on_token, which would not know whose token it is.
"""
function mxt_decoder_generate_each(decoder, sequences, sequence_count, options, tokens, capacity, written)
    return @ccall libmxfp4train.mxt_decoder_generate_each(
        decoder::Ptr{mxt_decoder},
        sequences::Ptr{Csize_t},
        sequence_count::Csize_t,
        options::Ptr{mxt_generate_options},
        tokens::Ptr{UInt32},
        capacity::Csize_t,
        written::Ptr{Csize_t}
    )::mxt_status
end

"""
    mxt_decoder_generate(decoder, sequence, options, tokens, capacity, written)

Samples a continuation of text `sequence`, which has at least one token, and appends it to the text;
where there is no more room, the oldest tokens fall out. The new tokens are written to `tokens`,
which has room for `capacity` of them, at least max_tokens; their number to `*written`. With
`tokens` NULL and `capacity` 0 they are only given to on_token. `options` may be NULL for the
defaults; its weights are not looked at, for the decoder has its own. Draws are numbered from 0 in
every call, so a text that is continued again wants another seed.

Errors: MXT_ERROR_NULL, MXT_ERROR_STRUCT_SIZE, MXT_ERROR_INVALID_ARGUMENT (no such sequence, no
token, an option out of range, a draft in MXFP4 without drafts in the decoder's options),
MXT_ERROR_BUFFER_TOO_SMALL, MXT_ERROR_NOT_FINITE (the logits), MXT_ERROR_OUT_OF_MEMORY,
MXT_ERROR_BUSY. After MXT_ERROR_NOT_FINITE and MXT_ERROR_OUT_OF_MEMORY the text may have new tokens
(mxt_decoder_tokens).
"""
function mxt_decoder_generate(decoder, sequence, options, tokens, capacity, written)
    return @ccall libmxfp4train.mxt_decoder_generate(
        decoder::Ptr{mxt_decoder},
        sequence::Csize_t,
        options::Ptr{mxt_generate_options},
        tokens::Ptr{UInt32},
        capacity::Csize_t,
        written::Ptr{Csize_t}
    )::mxt_status
end

"""
    mxt_decoder_rewind(decoder, sequence, len)

Takes the tokens of text `sequence` from number `len` on out again; others can follow. 0 empties
it.

Errors: MXT_ERROR_NULL, MXT_ERROR_INVALID_ARGUMENT (no such sequence, one with fewer tokens),
MXT_ERROR_BUSY.
"""
function mxt_decoder_rewind(decoder, sequence, len)
    return @ccall libmxfp4train.mxt_decoder_rewind(
        decoder::Ptr{mxt_decoder},
        sequence::Csize_t,
        len::Csize_t
    )::mxt_status
end

"""
    mxt_decoder_fork(decoder, from, to)

Makes text `to` that of sequence `from`, with what is computed of it, so that both can go on in
their own ways.

Errors: MXT_ERROR_NULL, MXT_ERROR_INVALID_ARGUMENT (no such sequence), MXT_ERROR_BUSY.
"""
function mxt_decoder_fork(decoder, from, to)
    return @ccall libmxfp4train.mxt_decoder_fork(
        decoder::Ptr{mxt_decoder},
        from::Csize_t,
        to::Csize_t
    )::mxt_status
end

"""
    mxt_decoder_tokens(decoder, sequence, tokens, capacity, written)

Copies the tokens of text `sequence` into `tokens`, which has room for `capacity` of them, and
stores their number in `*written`. With `tokens` NULL and `capacity` 0 their number alone.

Errors: MXT_ERROR_NULL, MXT_ERROR_INVALID_ARGUMENT (no such sequence), MXT_ERROR_BUFFER_TOO_SMALL,
MXT_ERROR_BUSY.
"""
function mxt_decoder_tokens(decoder, sequence, tokens, capacity, written)
    return @ccall libmxfp4train.mxt_decoder_tokens(
        decoder::Ptr{mxt_decoder},
        sequence::Csize_t,
        tokens::Ptr{UInt32},
        capacity::Csize_t,
        written::Ptr{Csize_t}
    )::mxt_status
end

"""
    mxt_decoder_last_error(decoder)

The message of the last call with this handle that failed, on whichever thread; the empty string
when there is none.

Never NULL. The text belongs to the calling thread and stays valid until that thread's next
call of mxt_decoder_last_error. Any thread may call it at any time.
"""
function mxt_decoder_last_error(decoder)
    return @ccall libmxfp4train.mxt_decoder_last_error(decoder::Ptr{mxt_decoder})::Cstring
end

"""
    mxt_decoder_free(decoder)

Gives the handle up; NULL does nothing. Its memory goes with it, and the model stays.
"""
function mxt_decoder_free(decoder)
    return @ccall libmxfp4train.mxt_decoder_free(decoder::Ptr{mxt_decoder})::Cvoid
end

"""
    mxt_dataset_options_init(options, struct_size)

Fills `options` with the defaults. `struct_size` is sizeof(mxt_dataset_options) as the caller's
compiler sees it.

Errors: MXT_ERROR_NULL, MXT_ERROR_STRUCT_SIZE.
"""
function mxt_dataset_options_init(options, struct_size)
    return @ccall libmxfp4train.mxt_dataset_options_init(
        options::Ptr{mxt_dataset_options},
        struct_size::Csize_t
    )::mxt_status
end

"""
    mxt_dataset_open(pattern, dataset)

Opens a token file, or all files that a pattern such as \"data/train_*.bin\" matches, in the order
of their names, and stores the dataset in `*dataset` for the caller to free. `*` and `?` match
within a name, `**` any number of folders; a path that exists is taken as it is.

Each file may be raw little-endian tokens of 16 bits, or of 32 or 64 where that is beyond doubt;
llm.c's format with its header; NumPy's .npy of uint8, uint16, uint32, int32 or int64, of one
dimension, or of two, read row by row; or Megatron's pair of .bin and .idx, of which either file
can be named, and which counts once where both match. Documents are not told apart, and windows
do not cross files. Links are followed, and a file that is found again through one counts once.

Files are mapped, not read, and none keeps a descriptor open. A file may be replaced by renaming
another over it, which changes nothing for the dataset; tokens that are written to it are
checked like all others. There may be any number of files; those beyond 16,384 are opened for
every read, and so must keep their names.

Errors: MXT_ERROR_NULL, MXT_ERROR_INVALID_ARGUMENT (a pattern that matches nothing),
MXT_ERROR_IO, MXT_ERROR_FORMAT (a damaged file, or one of another kind, which the message names
with the remedy), MXT_ERROR_OUT_OF_MEMORY. The message is in mxt_last_error.
"""
function mxt_dataset_open(pattern, dataset)
    return @ccall libmxfp4train.mxt_dataset_open(
        pattern::Cstring,
        dataset::Ptr{Ptr{mxt_dataset}}
    )::mxt_status
end

"""
    mxt_dataset_open_with(pattern, options, dataset)

Does what mxt_dataset_open does, with options. `options` may be NULL for the defaults.

Errors: those of mxt_dataset_open, MXT_ERROR_STRUCT_SIZE, and MXT_ERROR_INVALID_ARGUMENT for an
option, which the message names.
"""
function mxt_dataset_open_with(pattern, options, dataset)
    return @ccall libmxfp4train.mxt_dataset_open_with(
        pattern::Cstring,
        options::Ptr{mxt_dataset_options},
        dataset::Ptr{Ptr{mxt_dataset}}
    )::mxt_status
end

"""
    mxt_dataset_open_files(paths, count, dataset)

Opens `count` token files as one dataset, in the order given, and stores it in `*dataset` for
the caller to free. `paths` and its strings are borrowed for the call.

Errors: MXT_ERROR_NULL, MXT_ERROR_INVALID_ARGUMENT (no files), MXT_ERROR_IO, MXT_ERROR_FORMAT,
MXT_ERROR_OUT_OF_MEMORY. The message is in mxt_last_error.
"""
function mxt_dataset_open_files(paths, count, dataset)
    return @ccall libmxfp4train.mxt_dataset_open_files(
        paths::Ptr{Cstring},
        count::Csize_t,
        dataset::Ptr{Ptr{mxt_dataset}}
    )::mxt_status
end

"""
    mxt_dataset_open_files_with(paths, count, options, dataset)

Does what mxt_dataset_open_files does, with options. `options` may be NULL for the defaults.

Errors: those of mxt_dataset_open_files, MXT_ERROR_STRUCT_SIZE, and MXT_ERROR_INVALID_ARGUMENT
for an option, which the message names.
"""
function mxt_dataset_open_files_with(paths, count, options, dataset)
    return @ccall libmxfp4train.mxt_dataset_open_files_with(
        paths::Ptr{Cstring},
        count::Csize_t,
        options::Ptr{mxt_dataset_options},
        dataset::Ptr{Ptr{mxt_dataset}}
    )::mxt_status
end

"""
    mxt_dataset_from_tokens(tokens, count, dataset)

Makes a dataset from `count` tokens in memory, which are copied, and stores it in `*dataset` for
the caller to free.

Errors: MXT_ERROR_NULL, MXT_ERROR_INVALID_ARGUMENT, MXT_ERROR_OUT_OF_MEMORY. The message is in
mxt_last_error.
"""
function mxt_dataset_from_tokens(tokens, count, dataset)
    return @ccall libmxfp4train.mxt_dataset_from_tokens(
        tokens::Ptr{UInt32},
        count::Csize_t,
        dataset::Ptr{Ptr{mxt_dataset}}
    )::mxt_status
end

"""
    mxt_dataset_from_memory(tokens, count, token_type, user_data, user_data_free, dataset)

Makes a dataset from `count` tokens in memory of the host's, which are not copied, and stores it in
`*dataset` for the caller to free. `token_type` is MXT_TOKEN_TYPE_U16 or MXT_TOKEN_TYPE_U32. The
tokens have to stay there, unchanged, until `user_data_free` is called with `user_data`: once, when
mxt_dataset_free has been called and no other call uses the dataset any more, on the thread that
ends it. `user_data_free` may be NULL.

Errors: MXT_ERROR_NULL, MXT_ERROR_INVALID_ARGUMENT, MXT_ERROR_OUT_OF_MEMORY: the user data stay the
caller's then. The message is in mxt_last_error.
"""
function mxt_dataset_from_memory(tokens, count, token_type, user_data, user_data_free, dataset)
    return @ccall libmxfp4train.mxt_dataset_from_memory(
        tokens::Ptr{Cvoid},
        count::Csize_t,
        token_type::Int32,
        user_data::Ptr{Cvoid},
        user_data_free::mxt_user_data_free_fn,
        dataset::Ptr{Ptr{mxt_dataset}}
    )::mxt_status
end

"""
    mxt_dataset_from_windows(count, fill, user_data, user_data_free, dataset)

Makes a dataset of `count` windows that the host fills, numbered from 0, each time that one is
wanted, and stores it in `*dataset` for the caller to free. Training asks for all of them once
in an epoch, in an order that the engine's seed gives, an evaluation for some spread evenly, in
their order. A loss is the weighted sum over the sum of weights of its step or evaluation; a
step whose weights are all 0 has a loss of 0 and no gradient, such an evaluation is
MXT_ERROR_INVALID_ARGUMENT. The tokens of an evaluation are the targets whose weight is not 0.
Ranks of a group compare the number of windows, and not what is in them. Functions that read
tokens of a dataset return MXT_ERROR_UNSUPPORTED.

`user_data` is passed to `fill`, and to `user_data_free` (which may be NULL) as for
mxt_dataset_from_memory.

Errors: MXT_ERROR_NULL, MXT_ERROR_INVALID_ARGUMENT (a count of 0): the user data stay the caller's
then. The message is in mxt_last_error.
"""
function mxt_dataset_from_windows(count, fill, user_data, user_data_free, dataset)
    return @ccall libmxfp4train.mxt_dataset_from_windows(
        count::UInt64,
        fill::mxt_window_fn,
        user_data::Ptr{Cvoid},
        user_data_free::mxt_user_data_free_fn,
        dataset::Ptr{Ptr{mxt_dataset}}
    )::mxt_status
end

"""
    mxt_dataset_from_packed_windows(count, fill, user_data, user_data_free, dataset)

mxt_dataset_from_windows of windows that are packed with documents, which are kept apart as those
of mxt_batch are: where the number changes along a window another document begins. A window whose
numbers are all the same is cut at document_end of the trainer's options, where there is one. The
last input of a document has the first of the next as its target: its weight is to be 0 where that
is not to be learned.

Errors: as mxt_dataset_from_windows.
"""
function mxt_dataset_from_packed_windows(count, fill, user_data, user_data_free, dataset)
    return @ccall libmxfp4train.mxt_dataset_from_packed_windows(
        count::UInt64,
        fill::mxt_packed_window_fn,
        user_data::Ptr{Cvoid},
        user_data_free::mxt_user_data_free_fn,
        dataset::Ptr{Ptr{mxt_dataset}}
    )::mxt_status
end

"""
    mxt_dataset_token_count(dataset)

Number of tokens in all files; 0 where the host fills windows, and if `dataset` is NULL. Any thread
may call it at any time.
"""
function mxt_dataset_token_count(dataset)
    return @ccall libmxfp4train.mxt_dataset_token_count(dataset::Ptr{mxt_dataset})::UInt64
end

"""
    mxt_dataset_max_token(dataset, token)

Stores the largest token in `*token`: a model needs a vocab_size above it. Reads all files,
unless that has been done.

Any thread may call it at any time. Errors: MXT_ERROR_NULL, MXT_ERROR_IO, MXT_ERROR_TOKEN_RANGE
(a number below 0 or above 32 bits, which is no token).
"""
function mxt_dataset_max_token(dataset, token)
    return @ccall libmxfp4train.mxt_dataset_max_token(
        dataset::Ptr{mxt_dataset},
        token::Ptr{UInt32}
    )::mxt_status
end

"""
    mxt_dataset_coverage(dataset, sequence_length, coverage)

Counts what training with sequences of `sequence_length` tokens reads of the dataset, and stores
it in `*coverage` (struct_size set by the caller). Files without a whole window, of a sequence
and one more token, are never read; a trainer's first step with such a dataset says so in the
engine's log, unless this function was called with the trainer's length before.

Any thread may call it at any time. Errors: MXT_ERROR_NULL, MXT_ERROR_STRUCT_SIZE.
"""
function mxt_dataset_coverage(dataset, sequence_length, coverage)
    return @ccall libmxfp4train.mxt_dataset_coverage(
        dataset::Ptr{mxt_dataset},
        sequence_length::Csize_t,
        coverage::Ptr{mxt_coverage}
    )::mxt_status
end

"""
    mxt_dataset_read(dataset, first, count, tokens)

Copies `count` tokens, from number `first` on, to `tokens`, which has room for so many. Tokens
are counted from 0 over all files in their order. `tokens` may be NULL where `count` is 0.

Any thread may call it at any time. Errors: MXT_ERROR_NULL, MXT_ERROR_INVALID_ARGUMENT (the
dataset ends before `first` + `count`), MXT_ERROR_IO, MXT_ERROR_TOKEN_RANGE (a number below 0 or
above 32 bits, which is no token).
"""
function mxt_dataset_read(dataset, first, count, tokens)
    return @ccall libmxfp4train.mxt_dataset_read(
        dataset::Ptr{mxt_dataset},
        first::UInt64,
        count::Csize_t,
        tokens::Ptr{UInt32}
    )::mxt_status
end

"""
    mxt_dataset_last_error(dataset)

The message of the last call with this dataset as its first argument that failed; the empty
string when there is none. What goes wrong while a trainer reads it is on the trainer.

Never NULL. The text belongs to the calling thread and stays valid until that thread's next
call of mxt_dataset_last_error. Any thread may call it at any time.
"""
function mxt_dataset_last_error(dataset)
    return @ccall libmxfp4train.mxt_dataset_last_error(dataset::Ptr{mxt_dataset})::Cstring
end

"""
    mxt_dataset_free(dataset)

Gives the dataset up; NULL does nothing. Files are unmapped when no call uses it any more.
"""
function mxt_dataset_free(dataset)
    return @ccall libmxfp4train.mxt_dataset_free(dataset::Ptr{mxt_dataset})::Cvoid
end

"""
    mxt_trainer_options_init(options, struct_size)

Fills `options` with the defaults. `struct_size` is sizeof(mxt_trainer_options) as the caller's
compiler sees it.

Errors: MXT_ERROR_NULL, MXT_ERROR_STRUCT_SIZE.
"""
function mxt_trainer_options_init(options, struct_size)
    return @ccall libmxfp4train.mxt_trainer_options_init(
        options::Ptr{mxt_trainer_options},
        struct_size::Csize_t
    )::mxt_status
end

"""
    mxt_trainer_new(model, options, trainer)

Makes a trainer at step 0 of `model` and stores it in `*trainer` for the caller to free. All
memory of training is allocated here; see mxt_plan. `options` may be NULL for the defaults.

The trainer changes the weights of `model`. The handle `model` stays the caller's.

Errors: MXT_ERROR_NULL, MXT_ERROR_STRUCT_SIZE, MXT_ERROR_UTF8, MXT_ERROR_INVALID_ARGUMENT (names
the option), MXT_ERROR_OUT_OF_MEMORY, MXT_ERROR_UNSUPPORTED, MXT_ERROR_BUSY. The message is in
mxt_last_error and on the model.
"""
function mxt_trainer_new(model, options, trainer)
    return @ccall libmxfp4train.mxt_trainer_new(
        model::Ptr{mxt_model},
        options::Ptr{mxt_trainer_options},
        trainer::Ptr{Ptr{mxt_trainer}}
    )::mxt_status
end

"""
    mxt_trainer_load(engine, dir, trainer)

Loads what mxt_trainer_save wrote, model, moments, options and position, and stores the trainer
in `*trainer` for the caller to free. The next steps are the same, bit for bit, as if the run
had never stopped. The number of threads may differ; the seed is the checkpoint's.

Errors: MXT_ERROR_NULL, MXT_ERROR_INVALID_ARGUMENT, MXT_ERROR_IO, MXT_ERROR_FORMAT (a damaged
file; names the tensor), MXT_ERROR_MISMATCH, MXT_ERROR_NOT_FINITE (a number in a file),
MXT_ERROR_UNSUPPORTED (what the device cannot do), MXT_ERROR_OUT_OF_MEMORY. The message is in
mxt_last_error and on the engine.
"""
function mxt_trainer_load(engine, dir, trainer)
    return @ccall libmxfp4train.mxt_trainer_load(
        engine::Ptr{mxt_engine},
        dir::Cstring,
        trainer::Ptr{Ptr{mxt_trainer}}
    )::mxt_status
end

"""
    mxt_trainer_load_as(engine, dir, optimizer, trainer)

mxt_trainer_load, with moments, weights and gradients that are kept from here on in what
`optimizer` says, such as \"adamw,moments=int8\": they are rounded to it once, and the run goes on
as one that was made so. The optimizer itself must be the saved one; other switches need not be
named again, and cannot be changed. `optimizer` is borrowed for the call.

Errors: as mxt_trainer_load; MXT_ERROR_INVALID_ARGUMENT for another optimizer, too.
"""
function mxt_trainer_load_as(engine, dir, optimizer, trainer)
    return @ccall libmxfp4train.mxt_trainer_load_as(
        engine::Ptr{mxt_engine},
        dir::Cstring,
        optimizer::Cstring,
        trainer::Ptr{Ptr{mxt_trainer}}
    )::mxt_status
end

"""
    mxt_trainer_save(trainer, dir)

Saves model, moments, options and position to the folder `dir`, which is made if it is not
there. A failure, or a kill at any instant, leaves a whole checkpoint there, the one before or
the new one. Whatever else is in the folder stays. Hugging Face transformers opens the folder as
gpt2.

Errors: MXT_ERROR_NULL, MXT_ERROR_INVALID_ARGUMENT, MXT_ERROR_IO, MXT_ERROR_FORMAT (a file, or a
folder that holds other things and no checkpoint), MXT_ERROR_NOT_FINITE (a weight or a moment),
MXT_ERROR_BUSY.
"""
function mxt_trainer_save(trainer, dir)
    return @ccall libmxfp4train.mxt_trainer_save(
        trainer::Ptr{mxt_trainer},
        dir::Cstring
    )::mxt_status
end

"""
    mxt_trainer_step(trainer, dataset, stats)

Does one optimizer step on the next windows of `dataset` and stores what it did in `*stats`
(struct_size set by the caller; NULL if not wanted). A stop request does not concern it, as it does
mxt_trainer_step_unless_stopped.

Errors: MXT_ERROR_NULL, MXT_ERROR_STRUCT_SIZE, MXT_ERROR_INVALID_ARGUMENT (a dataset shorter
than a sequence; batches that wait for mxt_trainer_update), MXT_ERROR_TOKEN_RANGE (a token outside
of the vocabulary anywhere in the dataset, also where this step does not read it), MXT_ERROR_IO (a
file of the dataset has become shorter, or its disk fails), MXT_ERROR_NOT_FINITE (loss or gradient
are not, or a weight or moment would not be), MXT_ERROR_BUSY. Whatever the error, weights and
moments are as before the step.
"""
function mxt_trainer_step(trainer, dataset, stats)
    return @ccall libmxfp4train.mxt_trainer_step(
        trainer::Ptr{mxt_trainer},
        dataset::Ptr{mxt_dataset},
        stats::Ptr{mxt_step_stats}
    )::mxt_status
end

"""
    mxt_trainer_step_unless_stopped(trainer, dataset, stats)

mxt_trainer_step, given up where a stop is asked for (mxt_trainer_request_stop, from any thread
or signal handler, or a callback that fills windows): it is seen before each batch of the step.
The next step then does the same from its beginning. The request stands until
mxt_trainer_clear_stop.

Errors: as mxt_trainer_step, and MXT_STOPPED: weights and moments are as before the step.
"""
function mxt_trainer_step_unless_stopped(trainer, dataset, stats)
    return @ccall libmxfp4train.mxt_trainer_step_unless_stopped(
        trainer::Ptr{mxt_trainer},
        dataset::Ptr{mxt_dataset},
        stats::Ptr{mxt_step_stats}
    )::mxt_status
end

"""
    mxt_trainer_step_tokens(trainer, tokens, count, stats)

Does one optimizer step on the caller's own tokens and stores what it did in `*stats`
(struct_size set by the caller; NULL if not wanted).

`tokens` holds accumulation * batch_size rows of sequence_length + 1 tokens, row after row (of N
ranks each brings those of its own batches: accumulation / N, from rank * accumulation / N on), and
`count` is their number. Position t of a row learns to predict position t + 1. `tokens` may lie
in memory of the engine's GPU, written before the call or on the engine's stream.

Errors: MXT_ERROR_NULL, MXT_ERROR_STRUCT_SIZE, MXT_ERROR_INVALID_ARGUMENT (a wrong count; an
optimizer with \"ramping\", which draws windows of its own; batches that wait for
mxt_trainer_update), MXT_ERROR_TOKEN_RANGE, MXT_ERROR_NOT_FINITE (the weights are as before the
step), MXT_ERROR_BUSY.
"""
function mxt_trainer_step_tokens(trainer, tokens, count, stats)
    return @ccall libmxfp4train.mxt_trainer_step_tokens(
        trainer::Ptr{mxt_trainer},
        tokens::Ptr{UInt32},
        count::Csize_t,
        stats::Ptr{mxt_step_stats}
    )::mxt_status
end

"""
    mxt_trainer_eval(trainer, dataset, max_batches, stats)

Computes the mean loss over at most `max_batches` batches spread evenly over `dataset`, the same
ones in every call, and stores it in `*stats` (struct_size set by the caller). 0 takes all of
the dataset. Changes nothing of the run. A loss that is NaN or infinite is a result, not an
error.

A recipe with \"haste\" merges the channels that linear layers read, and `*stats` says what that
would spare.

Where no file has the tokens of a sequence and one more, each file of two tokens or more is one
shorter sequence of all its tokens; stats->tokens tells how many were predicted.

A stop request is seen before each batch; it stays for mxt_trainer_run, which may have called
back the caller.

Errors: MXT_ERROR_NULL, MXT_ERROR_STRUCT_SIZE, MXT_ERROR_INVALID_ARGUMENT (no file of two
tokens), MXT_ERROR_TOKEN_RANGE (anywhere in the dataset), MXT_ERROR_IO, MXT_ERROR_BUSY,
MXT_STOPPED.
"""
function mxt_trainer_eval(trainer, dataset, max_batches, stats)
    return @ccall libmxfp4train.mxt_trainer_eval(
        trainer::Ptr{mxt_trainer},
        dataset::Ptr{mxt_dataset},
        max_batches::Csize_t,
        stats::Ptr{mxt_eval_stats}
    )::mxt_status
end

"""
    mxt_trainer_set_sharpness(trainer, epsilon)

Asks evaluations from here on, those of mxt_trainer_run too, how sharp the loss is in the
logits: how much it could rise if each logit y moved by up to `epsilon` (|y| + 1), from above 0
to 1 (1e-3 is usual); 0 ends it. The loss itself stays the same, bit for bit. It takes 20 bytes
for each token of a batch, and is not saved with the run.

Errors: MXT_ERROR_NULL, MXT_ERROR_INVALID_ARGUMENT (another number), MXT_ERROR_OUT_OF_MEMORY,
MXT_ERROR_BUSY.
"""
function mxt_trainer_set_sharpness(trainer, epsilon)
    return @ccall libmxfp4train.mxt_trainer_set_sharpness(
        trainer::Ptr{mxt_trainer},
        epsilon::Cfloat
    )::mxt_status
end

"""
    mxt_trainer_set_lr(trainer, lr)

Takes `lr` as the learning rate from the next step on, in place of the schedule's. It is saved
with the run; mxt_trainer_use_schedule takes it back.

Errors: MXT_ERROR_NULL, MXT_ERROR_INVALID_ARGUMENT (negative or not finite), MXT_ERROR_BUSY.
"""
function mxt_trainer_set_lr(trainer, lr)
    return @ccall libmxfp4train.mxt_trainer_set_lr(
        trainer::Ptr{mxt_trainer},
        lr::Cfloat
    )::mxt_status
end

"""
    mxt_trainer_set_schedule(trainer, options)

Takes a new schedule from the next step on: `schedule`, `lr`, `min_lr`, `warmup_steps`,
`total_steps` and `decay_steps` of `options`; nothing else of it is read. Its steps are counted
from here: it begins with its warm-up and ends total_steps steps later. A rate that
mxt_trainer_set_lr set is dropped. The schedule, and where it began, are saved with the run.

Errors: MXT_ERROR_NULL, MXT_ERROR_STRUCT_SIZE, MXT_ERROR_INVALID_ARGUMENT (names the field; the
present schedule stays), MXT_ERROR_BUSY.
"""
function mxt_trainer_set_schedule(trainer, options)
    return @ccall libmxfp4train.mxt_trainer_set_schedule(
        trainer::Ptr{mxt_trainer},
        options::Ptr{mxt_trainer_options}
    )::mxt_status
end

"""
    mxt_trainer_use_schedule(trainer)

Returns to the schedule's learning rate after mxt_trainer_set_lr.

Errors: MXT_ERROR_NULL, MXT_ERROR_BUSY.
"""
function mxt_trainer_use_schedule(trainer)
    return @ccall libmxfp4train.mxt_trainer_use_schedule(
        trainer::Ptr{mxt_trainer}
    )::mxt_status
end

"""
    mxt_trainer_schedule_start(trainer)

The step that the schedule counts from: 0, or the number of steps that were done when
mxt_trainer_set_schedule set it. 0 if `trainer` is NULL. Any thread may call it at any time,
also while a step is running.
"""
function mxt_trainer_schedule_start(trainer)
    return @ccall libmxfp4train.mxt_trainer_schedule_start(
        trainer::Ptr{mxt_trainer}
    )::UInt64
end

"""
    mxt_trainer_steps_done(trainer)

Number of optimizer steps done since step 0, those before a save and load included. 0 if
`trainer` is NULL. Any thread may call it at any time, also while a step is running.
"""
function mxt_trainer_steps_done(trainer)
    return @ccall libmxfp4train.mxt_trainer_steps_done(trainer::Ptr{mxt_trainer})::UInt64
end

"""
    mxt_trainer_model(trainer, model)

Stores a new handle on the trainer's model in `*model`, for the caller to free. It is the same
model: the next step changes what the handle reads.

Any thread may call it at any time. Errors: MXT_ERROR_NULL.
"""
function mxt_trainer_model(trainer, model)
    return @ccall libmxfp4train.mxt_trainer_model(
        trainer::Ptr{mxt_trainer},
        model::Ptr{Ptr{mxt_model}}
    )::mxt_status
end

"""
    mxt_trainer_get_options(trainer, options)

Stores the options that the trainer was made from, or loaded with, and the schedule last set, in
`*options` (struct_size set by the caller). Its texts are valid as long as the trainer.

Any thread may call it at any time. Errors: MXT_ERROR_NULL, MXT_ERROR_STRUCT_SIZE.
"""
function mxt_trainer_get_options(trainer, options)
    return @ccall libmxfp4train.mxt_trainer_get_options(
        trainer::Ptr{mxt_trainer},
        options::Ptr{mxt_trainer_options}
    )::mxt_status
end

"""
    mxt_trainer_request_stop(trainer)

Asks mxt_trainer_run to stop: before its next step, or before the next batch of a step of
several batches or of an evaluation, which then count as not done. A run that is not started yet
stops at once. mxt_trainer_eval stops with MXT_STOPPED. The request stands until a run uses it
up, and with it all that come before that run has returned, or mxt_trainer_clear_stop takes it
back. NULL does nothing.

Any thread and any signal handler may call it at any time: it is one atomic store. The handle
must not be freed meanwhile.
"""
function mxt_trainer_request_stop(trainer)
    return @ccall libmxfp4train.mxt_trainer_request_stop(trainer::Ptr{mxt_trainer})::Cvoid
end

"""
    mxt_trainer_clear_stop(trainer)

Takes a stop request back that no run has used up. NULL does nothing.

Any thread and any signal handler may call it at any time, as mxt_trainer_request_stop.
"""
function mxt_trainer_clear_stop(trainer)
    return @ccall libmxfp4train.mxt_trainer_clear_stop(trainer::Ptr{mxt_trainer})::Cvoid
end

"""
    mxt_trainer_last_error(trainer)

The message of the last call with this trainer that failed, on whichever thread; the empty
string when there is none.

Never NULL. The text belongs to the calling thread and stays valid until that thread's next
call of mxt_trainer_last_error. Any thread may call it at any time.
"""
function mxt_trainer_last_error(trainer)
    return @ccall libmxfp4train.mxt_trainer_last_error(trainer::Ptr{mxt_trainer})::Cstring
end

"""
    mxt_trainer_free(trainer)

Gives the trainer up; NULL does nothing. Nothing is saved. Its model stays usable through other
handles. A callback may free the trainer that called it: the run then stops before its next
step.
"""
function mxt_trainer_free(trainer)
    return @ccall libmxfp4train.mxt_trainer_free(trainer::Ptr{mxt_trainer})::Cvoid
end

"""
    mxt_plan(engine, config, options, result)

Computes the bytes that a model of this shape with its trainer will take, before anything is
allocated, and stores them in `*result` (struct_size set by the caller). `options` may be NULL
for the defaults. The engine's memory limit does not concern it.

Errors: MXT_ERROR_NULL, MXT_ERROR_STRUCT_SIZE, MXT_ERROR_UTF8, MXT_ERROR_INVALID_ARGUMENT,
MXT_ERROR_UNSUPPORTED (what the device cannot do).
"""
function mxt_plan(engine, config, options, result)
    return @ccall libmxfp4train.mxt_plan(
        engine::Ptr{mxt_engine},
        config::Ptr{mxt_model_config},
        options::Ptr{mxt_trainer_options},
        result::Ptr{mxt_memory_plan}
    )::mxt_status
end

"""
    mxt_batch_init(batch, struct_size)

Fills `batch` with the defaults. `struct_size` is sizeof(mxt_batch) as the caller's header has it.

Errors: MXT_ERROR_NULL, MXT_ERROR_STRUCT_SIZE.
"""
function mxt_batch_init(batch, struct_size)
    return @ccall libmxfp4train.mxt_batch_init(
        batch::Ptr{mxt_batch},
        struct_size::Csize_t
    )::mxt_status
end

"""
    mxt_trainer_forward_backward(trainer, batch)

Computes the gradients of a batch, and adds them to those of the batches since the last update:
of the sum of all weighted losses over the sum of divisors. mxt_trainer_update makes the step of
them. Where `accumulation` such batches have no weights but 1, that step has the bits of
mxt_trainer_step_tokens; any other number of batches is as good, but where the trainer has
lanes, or is in a group of ranks, of which each gives its accumulation / ranks; or keeps
gradients in bf16, which take one.

It is not collective. mxt_trainer_step and its like return MXT_ERROR_INVALID_ARGUMENT while batches
wait for an update; evaluating and saving go on, and a checkpoint does not have them.

Errors: MXT_ERROR_NULL, MXT_ERROR_STRUCT_SIZE, MXT_ERROR_INVALID_ARGUMENT (another `count`; more
batches than a step has; gradients that were written or scaled; an optimizer with \"ramping\";
documents with a token_drop or \"haste\"),
MXT_ERROR_TOKEN_RANGE, MXT_ERROR_NOT_FINITE (a weight), MXT_ERROR_BUSY: the batches before still
wait then. MXT_STOPPED (`loss` returned another number than 0): none of them does any more, and
the step begins anew.
"""
function mxt_trainer_forward_backward(trainer, batch)
    return @ccall libmxfp4train.mxt_trainer_forward_backward(
        trainer::Ptr{mxt_trainer},
        batch::Ptr{mxt_batch}
    )::mxt_status
end

"""
    mxt_trainer_forward(trainer, batch, stats)

Computes the loss of a batch, without gradients, and stores it in `*stats` (struct_size set by
the caller): the sum of its weighted losses over its divisor; the tokens are the targets whose
weight is not 0. Like mxt_trainer_eval it changes nothing of the run, batches that wait for an
update included, and a loss that is NaN or infinite is a result, not an error. What a `loss` of
the batch writes for gradients is dropped. It is not collective.

Errors: MXT_ERROR_NULL, MXT_ERROR_STRUCT_SIZE, MXT_ERROR_INVALID_ARGUMENT (another `count`; a
divisor that is not above 0, as where every target is ignored), MXT_ERROR_TOKEN_RANGE,
MXT_ERROR_NOT_FINITE (a weight), MXT_STOPPED (`loss` returned another number than 0),
MXT_ERROR_BUSY.
"""
function mxt_trainer_forward(trainer, batch, stats)
    return @ccall libmxfp4train.mxt_trainer_forward(
        trainer::Ptr{mxt_trainer},
        batch::Ptr{mxt_batch},
        stats::Ptr{mxt_eval_stats}
    )::mxt_status
end

"""
    mxt_trainer_update(trainer, stats)

One optimizer step by the gradients of all batches since the last one
(mxt_trainer_forward_backward) and stores what it did in `*stats` (struct_size set by the
caller; NULL if not wanted): clips, and moves the weights. Collective in a group of ranks.

Errors: MXT_ERROR_NULL, MXT_ERROR_STRUCT_SIZE, MXT_ERROR_INVALID_ARGUMENT (no batch waits, or
too few with lanes; or the divisors of all of them are not above 0 together, as where every
target is ignored, or beyond 1e-20 or 1e20 a position), MXT_ERROR_NOT_FINITE, MXT_ERROR_BUSY.
Weights and moments are then as before. Batches still wait where there are too few, here or on
another rank, and where ranks ask for different things; after any other error none does.
"""
function mxt_trainer_update(trainer, stats)
    return @ccall libmxfp4train.mxt_trainer_update(
        trainer::Ptr{mxt_trainer},
        stats::Ptr{mxt_step_stats}
    )::mxt_status
end

"""
    mxt_trainer_zero_gradients(trainer)

Drops the gradients that wait for an update; the next batch begins a step anew.

Errors: MXT_ERROR_NULL, MXT_ERROR_BUSY.
"""
function mxt_trainer_zero_gradients(trainer)
    return @ccall libmxfp4train.mxt_trainer_zero_gradients(
        trainer::Ptr{mxt_trainer}
    )::mxt_status
end

"""
    mxt_trainer_scale_gradients(trainer, tensor, factor)

Multiplies the gradient that waits for an update by `factor`, of the tensor of this name or, where
`tensor` is NULL, of all. No batch can be added then. `tensor` is borrowed for the call.

Errors: MXT_ERROR_NULL, MXT_ERROR_UTF8, MXT_ERROR_NO_SUCH_TENSOR, MXT_ERROR_INVALID_ARGUMENT (a
factor that is not finite; no gradient waits), MXT_ERROR_UNSUPPORTED (with lanes, or in a group),
MXT_ERROR_BUSY.
"""
function mxt_trainer_scale_gradients(trainer, tensor, factor)
    return @ccall libmxfp4train.mxt_trainer_scale_gradients(
        trainer::Ptr{mxt_trainer},
        tensor::Cstring,
        factor::Cfloat
    )::mxt_status
end

"""
    mxt_trainer_is_trained(trainer, tensor, is_trained)

Stores 1 in `*is_trained` where a tensor is trained, so that it has a gradient, and 0 where it is
frozen or beside adapters.

Errors: MXT_ERROR_NULL, MXT_ERROR_UTF8, MXT_ERROR_NO_SUCH_TENSOR, MXT_ERROR_BUSY.
"""
function mxt_trainer_is_trained(trainer, tensor, is_trained)
    return @ccall libmxfp4train.mxt_trainer_is_trained(
        trainer::Ptr{mxt_trainer},
        tensor::Cstring,
        is_trained::Ptr{Int32}
    )::mxt_status
end

"""
    mxt_trainer_read_gradient(trainer, tensor, values, count)

Copies the gradient of a tensor to `values`, which has room for `count` numbers, in the shape
that mxt_model_tensor_info gives: of the last step, before clipping; or, where batches wait for
an update, of their loss so far (of this rank, and of its last lane). Gradients that were
dropped, by mxt_trainer_zero_gradients or an error, are not read. `values` may lie on the
engine's GPU.

Errors: MXT_ERROR_NULL, MXT_ERROR_UTF8, MXT_ERROR_NO_SUCH_TENSOR, MXT_ERROR_INVALID_ARGUMENT
(another count; dropped gradients; the divisors of the batches are not above 0 together),
MXT_ERROR_UNSUPPORTED (a tensor of which another rank has the gradient), MXT_ERROR_BUSY.
"""
function mxt_trainer_read_gradient(trainer, tensor, values, count)
    return @ccall libmxfp4train.mxt_trainer_read_gradient(
        trainer::Ptr{mxt_trainer},
        tensor::Cstring,
        values::Ptr{Cfloat},
        count::Csize_t
    )::mxt_status
end

"""
    mxt_trainer_write_gradient(trainer, tensor, values, count)

Overwrites the gradient of a tensor that waits for an update, in the shape that
mxt_model_tensor_info gives; mxt_trainer_read_gradient then reads the same. Where none waits,
those of all other tensors are 0: a host may bring all gradients itself. No batch can be added
then. `values` may lie on the engine's GPU.

Errors: MXT_ERROR_NULL, MXT_ERROR_UTF8, MXT_ERROR_NO_SUCH_TENSOR, MXT_ERROR_INVALID_ARGUMENT (as
for mxt_trainer_read_gradient), MXT_ERROR_NOT_FINITE, MXT_ERROR_UNSUPPORTED (with lanes, or in a
group), MXT_ERROR_OUT_OF_MEMORY, MXT_ERROR_BUSY.
"""
function mxt_trainer_write_gradient(trainer, tensor, values, count)
    return @ccall libmxfp4train.mxt_trainer_write_gradient(
        trainer::Ptr{mxt_trainer},
        tensor::Cstring,
        values::Ptr{Cfloat},
        count::Csize_t
    )::mxt_status
end

"""
    mxt_trainer_snapshot(trainer, snapshot)

Copies all that mxt_trainer_save would write to the host, and stores the copy in `*snapshot` for the
caller to free. It takes as much memory as the two tensor files of a checkpoint together. The
trainer may be freed before it. Not collective, but with shard_states of mxt_group: then all ranks
make it, and that of rank 0 has all that there is to save.

Errors: MXT_ERROR_NULL, MXT_ERROR_OUT_OF_MEMORY (also where the host has less memory free),
MXT_ERROR_DEVICE, MXT_ERROR_BUSY, MXT_ERROR_MISMATCH, MXT_ERROR_PEER. The message is in mxt_last_error and on the
trainer.
"""
function mxt_trainer_snapshot(trainer, snapshot)
    return @ccall libmxfp4train.mxt_trainer_snapshot(
        trainer::Ptr{mxt_trainer},
        snapshot::Ptr{Ptr{mxt_snapshot}}
    )::mxt_status
end

"""
    mxt_snapshot_renew(snapshot, trainer)

Copies `trainer` as it is now into a snapshot that was made before, of this trainer or another, in
place of what it held: its memory is used again, which is faster than new memory, and kept where
less is needed.

Errors: MXT_ERROR_NULL, MXT_ERROR_OUT_OF_MEMORY, after which the snapshot may hold nothing,
MXT_ERROR_DEVICE, after which neither can be used, MXT_ERROR_BUSY (another call is inside one of
them: the snapshot is then as it was). Where it is collective (mxt_group's shard_states),
MXT_ERROR_MISMATCH and MXT_ERROR_PEER, after which it is as it was, unless a rank is lost while
others bring what they have: then it holds nothing. The message is in mxt_last_error and on the snapshot.
"""
function mxt_snapshot_renew(snapshot, trainer)
    return @ccall libmxfp4train.mxt_snapshot_renew(
        snapshot::Ptr{mxt_snapshot},
        trainer::Ptr{mxt_trainer}
    )::mxt_status
end

"""
    mxt_snapshot_save(snapshot, dir)

Saves what the trainer was to the folder `dir`, as mxt_trainer_save would have done then. Any thread
may call it, also while the trainer is in a step.

Errors: those of mxt_trainer_save; MXT_ERROR_INVALID_ARGUMENT behind a mxt_snapshot_renew that
failed, and where another rank than 0 has only a part (mxt_group's shard_states).
"""
function mxt_snapshot_save(snapshot, dir)
    return @ccall libmxfp4train.mxt_snapshot_save(
        snapshot::Ptr{mxt_snapshot},
        dir::Cstring
    )::mxt_status
end

"""
    mxt_snapshot_last_error(snapshot)

The message of the last call with this handle that failed, on whichever thread; the empty string
when there is none.

Never NULL. The text belongs to the calling thread and stays valid until that thread's next
call of mxt_snapshot_last_error. Any thread may call it at any time.
"""
function mxt_snapshot_last_error(snapshot)
    return @ccall libmxfp4train.mxt_snapshot_last_error(
        snapshot::Ptr{mxt_snapshot}
    )::Cstring
end

"""
    mxt_snapshot_free(snapshot)

Gives the handle up, and its memory; NULL does nothing.
"""
function mxt_snapshot_free(snapshot)
    return @ccall libmxfp4train.mxt_snapshot_free(snapshot::Ptr{mxt_snapshot})::Cvoid
end

"""
    mxt_file_callbacks_init(callbacks, struct_size)

Fills `callbacks` with the defaults. `struct_size` is sizeof(mxt_file_callbacks) as the caller's
compiler sees it.

Errors: MXT_ERROR_NULL, MXT_ERROR_STRUCT_SIZE.
"""
function mxt_file_callbacks_init(callbacks, struct_size)
    return @ccall libmxfp4train.mxt_file_callbacks_init(
        callbacks::Ptr{mxt_file_callbacks},
        struct_size::Csize_t
    )::mxt_status
end

"""
    mxt_files_from_callbacks(callbacks, files)

Makes files that the host reads and writes, and stores them in `*files` for the caller to free.
`callbacks` is not read after the call.

Errors: MXT_ERROR_NULL (also for functions that must be there), MXT_ERROR_STRUCT_SIZE. The
message is in mxt_last_error.
"""
function mxt_files_from_callbacks(callbacks, files)
    return @ccall libmxfp4train.mxt_files_from_callbacks(
        callbacks::Ptr{mxt_file_callbacks},
        files::Ptr{Ptr{mxt_files}}
    )::mxt_status
end

"""
    mxt_files_in_memory(files)

Makes a set of files in memory, of which there are none yet, and stores it in `*files` for the
caller to free.

Errors: MXT_ERROR_NULL. The message is in mxt_last_error.
"""
function mxt_files_in_memory(files)
    return @ccall libmxfp4train.mxt_files_in_memory(files::Ptr{Ptr{mxt_files}})::mxt_status
end

"""
    mxt_files_count(files)

Number of files in memory. 0 for files of the host's own, while another call changes them, and
if `files` is NULL.
"""
function mxt_files_count(files)
    return @ccall libmxfp4train.mxt_files_count(files::Ptr{mxt_files})::Csize_t
end

"""
    mxt_files_name(files, index)

The name of file `index` in memory (0 to mxt_files_count - 1), in the order of their bytes; NULL
where there is no such file, and if `files` is NULL. The text is valid until the files change or
are freed.
"""
function mxt_files_name(files, index)
    return @ccall libmxfp4train.mxt_files_name(
        files::Ptr{mxt_files},
        index::Csize_t
    )::Cstring
end

"""
    mxt_files_view(files, name, bytes, count)

Stores in `*bytes` where the bytes of a file in memory lie, and in `*count` how many there are.
They are valid, to be read, until the files change or are freed.

Errors: MXT_ERROR_NULL, MXT_ERROR_UTF8, MXT_ERROR_INVALID_ARGUMENT (no file of this name, or
files of the host's own), MXT_ERROR_BUSY.
"""
function mxt_files_view(files, name, bytes, count)
    return @ccall libmxfp4train.mxt_files_view(
        files::Ptr{mxt_files},
        name::Cstring,
        bytes::Ptr{Ptr{Cvoid}},
        count::Ptr{Csize_t}
    )::mxt_status
end

"""
    mxt_files_put(files, name, bytes, count)

Puts a copy of `count` bytes into memory as the file `name`, in place of one of the same name.

Errors: MXT_ERROR_NULL, MXT_ERROR_UTF8, MXT_ERROR_INVALID_ARGUMENT (an empty name, files of the
host's own), MXT_ERROR_OUT_OF_MEMORY, MXT_ERROR_BUSY; the files are then as before.
"""
function mxt_files_put(files, name, bytes, count)
    return @ccall libmxfp4train.mxt_files_put(
        files::Ptr{mxt_files},
        name::Cstring,
        bytes::Ptr{Cvoid},
        count::Csize_t
    )::mxt_status
end

"""
    mxt_files_lend(files, name, bytes, count, user_data, user_data_free)

mxt_files_put without a copy, of bytes that lie in the host's memory, such as a map of a file:
they have to stay there, unchanged, until `user_data_free` is called with `user_data`: once,
when the file is replaced or removed or the files are freed. `user_data_free` may be NULL; calls
on the files from it return MXT_ERROR_BUSY.

Errors: those of mxt_files_put; the user data stay the caller's then.
"""
function mxt_files_lend(files, name, bytes, count, user_data, user_data_free)
    return @ccall libmxfp4train.mxt_files_lend(
        files::Ptr{mxt_files},
        name::Cstring,
        bytes::Ptr{Cvoid},
        count::Csize_t,
        user_data::Ptr{Cvoid},
        user_data_free::mxt_user_data_free_fn
    )::mxt_status
end

"""
    mxt_files_remove(files, name)

Removes a file from memory.

Errors: as mxt_files_view.
"""
function mxt_files_remove(files, name)
    return @ccall libmxfp4train.mxt_files_remove(
        files::Ptr{mxt_files},
        name::Cstring
    )::mxt_status
end

"""
    mxt_model_load_from(engine, files, model)

mxt_model_load of files that lie elsewhere than in a folder. They are read in pieces; memory
that was lent is not copied.

Errors: those of mxt_model_load, with MXT_ERROR_IO for what the host's functions fail at, and
MXT_ERROR_BUSY.
"""
function mxt_model_load_from(engine, files, model)
    return @ccall libmxfp4train.mxt_model_load_from(
        engine::Ptr{mxt_engine},
        files::Ptr{mxt_files},
        model::Ptr{Ptr{mxt_model}}
    )::mxt_status
end

"""
    mxt_model_save_to(model, files, weights)

mxt_model_save_as to files that lie elsewhere than in a folder. `weights` is one of
mxt_stored_weights. A failure leaves the files as they were, and where they are the host's its
functions see to that.

Errors: MXT_ERROR_NULL, MXT_ERROR_INVALID_ARGUMENT, MXT_ERROR_IO (what the host's functions fail
at), MXT_ERROR_NOT_FINITE (a weight), MXT_ERROR_OUT_OF_MEMORY, MXT_ERROR_BUSY.
"""
function mxt_model_save_to(model, files, weights)
    return @ccall libmxfp4train.mxt_model_save_to(
        model::Ptr{mxt_model},
        files::Ptr{mxt_files},
        weights::Int32
    )::mxt_status
end

"""
    mxt_model_load_lora_from(model, files, adapted)

mxt_model_load_lora of files that lie elsewhere than in a folder.

Errors: those of mxt_model_load_lora, with MXT_ERROR_IO for what the host's functions fail at.
"""
function mxt_model_load_lora_from(model, files, adapted)
    return @ccall libmxfp4train.mxt_model_load_lora_from(
        model::Ptr{mxt_model},
        files::Ptr{mxt_files},
        adapted::Ptr{Ptr{mxt_model}}
    )::mxt_status
end

"""
    mxt_model_save_lora_to(model, files)

mxt_model_save_lora to files that lie elsewhere than in a folder. In memory a checkpoint beside them
stays; give adapters a set of files of their own where `commit` of the host replaces all.

Errors: those of mxt_model_save_to, and MXT_ERROR_INVALID_ARGUMENT also for a model without
adapters.
"""
function mxt_model_save_lora_to(model, files)
    return @ccall libmxfp4train.mxt_model_save_lora_to(
        model::Ptr{mxt_model},
        files::Ptr{mxt_files}
    )::mxt_status
end

"""
    mxt_trainer_load_from(engine, files, optimizer, trainer)

mxt_trainer_load of files that lie elsewhere than in a folder or, where `optimizer` is not NULL,
mxt_trainer_load_as.

Errors: those of mxt_trainer_load_as, with MXT_ERROR_IO for what the host's functions fail at,
and MXT_ERROR_BUSY.
"""
function mxt_trainer_load_from(engine, files, optimizer, trainer)
    return @ccall libmxfp4train.mxt_trainer_load_from(
        engine::Ptr{mxt_engine},
        files::Ptr{mxt_files},
        optimizer::Cstring,
        trainer::Ptr{Ptr{mxt_trainer}}
    )::mxt_status
end

"""
    mxt_trainer_save_to(trainer, files)

mxt_trainer_save to files that lie elsewhere than in a folder. A failure leaves the files as
they were, and where they are the host's its functions see to that. Collective; of a group, rank
0 writes, and files of other ranks are not touched.

Errors: those of mxt_model_save_to, and MXT_ERROR_NOT_FINITE also for a moment.
"""
function mxt_trainer_save_to(trainer, files)
    return @ccall libmxfp4train.mxt_trainer_save_to(
        trainer::Ptr{mxt_trainer},
        files::Ptr{mxt_files}
    )::mxt_status
end

"""
    mxt_snapshot_save_to(snapshot, files)

mxt_snapshot_save to files that lie elsewhere than in a folder.

Errors: those of mxt_snapshot_save and of mxt_trainer_save_to.
"""
function mxt_snapshot_save_to(snapshot, files)
    return @ccall libmxfp4train.mxt_snapshot_save_to(
        snapshot::Ptr{mxt_snapshot},
        files::Ptr{mxt_files}
    )::mxt_status
end

"""
    mxt_files_last_error(files)

The message of the last call with this handle that failed, on whichever thread; the empty string
when there is none.

Never NULL. The text belongs to the calling thread and stays valid until that thread's next
call of mxt_files_last_error. Any thread may call it at any time.
"""
function mxt_files_last_error(files)
    return @ccall libmxfp4train.mxt_files_last_error(files::Ptr{mxt_files})::Cstring
end

"""
    mxt_files_free(files)

Gives the files up, and those in memory with them; NULL does nothing. What was loaded from them
stays usable.
"""
function mxt_files_free(files)
    return @ccall libmxfp4train.mxt_files_free(files::Ptr{mxt_files})::Cvoid
end

"""
    mxt_trainer_watch_updates(trainer, every)

Watches the updates of the steps that `every` divides, from here on, those of mxt_trainer_run
too: the stats of such a step have update_rms_max and update_rms_tensor, and
mxt_trainer_tensor_update has what each tensor's update was. 0 ends it, and a new watch forgets
what the one before has found. A step that is watched reads gradients and second moments once
more. It changes nothing of the run, bit for bit, and is not saved with it.

Errors: MXT_ERROR_NULL, MXT_ERROR_OUT_OF_MEMORY (the watch before stays), MXT_ERROR_BUSY,
MXT_ERROR_INVALID_ARGUMENT in a group with shard_states.
"""
function mxt_trainer_watch_updates(trainer, every)
    return @ccall libmxfp4train.mxt_trainer_watch_updates(
        trainer::Ptr{mxt_trainer},
        every::UInt64
    )::mxt_status
end

"""
    mxt_trainer_tensor_update(trainer, tensor, update)

Stores what the last update that was watched (mxt_trainer_watch_updates) did to the tensor of
this name in `*update`, whose struct_size the caller has set. `tensor` is borrowed for the call.

Errors: MXT_ERROR_NULL, MXT_ERROR_STRUCT_SIZE, MXT_ERROR_UTF8, MXT_ERROR_NO_SUCH_TENSOR,
MXT_ERROR_INVALID_ARGUMENT (no update was watched yet), MXT_ERROR_BUSY.
"""
function mxt_trainer_tensor_update(trainer, tensor, update)
    return @ccall libmxfp4train.mxt_trainer_tensor_update(
        trainer::Ptr{mxt_trainer},
        tensor::Cstring,
        update::Ptr{mxt_tensor_update}
    )::mxt_status
end

"""
    mxt_trainer_watch_weights(trainer, every)

Watches how the weights of blocks change, and what they are rounded to in the forward pass, over
windows of `every` steps from here on, those of mxt_trainer_run too: mxt_trainer_weight_metrics
has what each window has shown. 0 ends it; so does any call, also one that fails, of the watch
before. It takes 12 bytes a weight and 8 for each element of the largest. It changes nothing of
the run, bit for bit, and is not saved with it.

Errors: MXT_ERROR_NULL, MXT_ERROR_INVALID_ARGUMENT (a recipe whose forward pass holds no weights
in blocks of MXFP4 or NVFP4, unrotated, as \"tetrajet\" does; an optimizer with \"master=split\"),
MXT_ERROR_OUT_OF_MEMORY, MXT_ERROR_BUSY.
"""
function mxt_trainer_watch_weights(trainer, every)
    return @ccall libmxfp4train.mxt_trainer_watch_weights(
        trainer::Ptr{mxt_trainer},
        every::UInt64
    )::mxt_status
end

"""
    mxt_trainer_weight_metrics(trainer, tensor, metrics)

Stores what the last whole window of steps (mxt_trainer_watch_weights) has shown in `*metrics`,
whose struct_size the caller has set: of the tensor of this name or, where `tensor` is NULL, of
all that are watched. `tensor` is borrowed for the call.

Errors: MXT_ERROR_NULL, MXT_ERROR_STRUCT_SIZE, MXT_ERROR_UTF8, MXT_ERROR_NO_SUCH_TENSOR,
MXT_ERROR_INVALID_ARGUMENT (no window is whole yet, or the tensor is none of those that are
watched), MXT_ERROR_BUSY.
"""
function mxt_trainer_weight_metrics(trainer, tensor, metrics)
    return @ccall libmxfp4train.mxt_trainer_weight_metrics(
        trainer::Ptr{mxt_trainer},
        tensor::Cstring,
        metrics::Ptr{mxt_weight_metrics}
    )::mxt_status
end

"""
    mxt_run_options_init(options, struct_size)

Fills `options` with the defaults. `struct_size` is sizeof(mxt_run_options) as the caller's
compiler sees it.

Errors: MXT_ERROR_NULL, MXT_ERROR_STRUCT_SIZE.
"""
function mxt_run_options_init(options, struct_size)
    return @ccall libmxfp4train.mxt_run_options_init(
        options::Ptr{mxt_run_options},
        struct_size::Csize_t
    )::mxt_status
end

"""
    mxt_trainer_run(trainer, dataset, options, result)

Does options->steps steps on `dataset`, with evaluations, checkpoints and a callback, until they
are done, the callback ends it or a stop is requested; stores what it did in `*result`
(struct_size set by the caller; NULL if not wanted).

The trainer is in use only inside each step, evaluation and checkpoint, not while the callback
runs.

An evaluation or a checkpoint that fails does not end the run: the log gets a warning, the
result counts it, and the next one is tried when it is due. Where the last evaluation of the run
failed, or its last checkpoint, the call returns that error, at its end: all steps that were to
be done are, and after a failed evaluation they are also saved. Only an error of a step, a
device that fails and a panic end the run; the steps before are then saved, if there is where to
and the trainer is usable, but not where ranks of a group differ (MXT_ERROR_MISMATCH): others may
have gone on. After any error mxt_trainer_steps_done counts the steps done, which
can be saved (again), and `*result` is not written.

Errors: those of mxt_trainer_step, mxt_trainer_eval and mxt_trainer_save, except MXT_STOPPED.
"""
function mxt_trainer_run(trainer, dataset, options, result)
    return @ccall libmxfp4train.mxt_trainer_run(
        trainer::Ptr{mxt_trainer},
        dataset::Ptr{mxt_dataset},
        options::Ptr{mxt_run_options},
        result::Ptr{mxt_run_result}
    )::mxt_status
end

end
