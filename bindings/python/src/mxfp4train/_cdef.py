"""The C API for cffi. Made from include/mxfp4train.h by gen/cdef.py, to be run when it changes."""

CDEF = """
#define MXT_VERSION_MAJOR 0
#define MXT_VERSION_MINOR 1
#define MXT_VERSION_PATCH 0
#define MXT_ABI_VERSION 0
#define MXT_MAX_RANK 4
#define MXT_IGNORED 4294967295
#define MXT_NO_SUCH_FILE 1
typedef enum mxt_status_code {
  MXT_OK = 0,
  MXT_ERROR_NULL = -1,
  MXT_ERROR_INVALID_ARGUMENT = -2,
  MXT_ERROR_UTF8 = -3,
  MXT_ERROR_STRUCT_SIZE = -4,
  MXT_ERROR_BUSY = -5,
  MXT_ERROR_POISONED = -6,
  MXT_ERROR_PANIC = -7,
  MXT_ERROR_IO = -8,
  MXT_ERROR_FORMAT = -9,
  MXT_ERROR_MISMATCH = -10,
  MXT_ERROR_TOKEN_RANGE = -11,
  MXT_ERROR_OUT_OF_MEMORY = -12,
  MXT_ERROR_UNSUPPORTED = -13,
  MXT_ERROR_NOT_FINITE = -14,
  MXT_ERROR_NO_SUCH_TENSOR = -15,
  MXT_ERROR_BUFFER_TOO_SMALL = -16,
  MXT_ERROR_FORKED = -17,
  MXT_ERROR_DEVICE = -18,
  MXT_STOPPED = -19,
  MXT_ERROR_PEER = -20,
} mxt_status_code;
typedef enum mxt_log_level {
  MXT_LOG_LEVEL_WARNING = 1,
  MXT_LOG_LEVEL_INFO = 2,
  MXT_LOG_LEVEL_DEBUG = 3,
} mxt_log_level;
typedef enum mxt_architecture {
  MXT_ARCHITECTURE_GPT2 = 0,
  MXT_ARCHITECTURE_LLAMA = 1,
} mxt_architecture;
typedef enum mxt_rope_scaling {
  MXT_ROPE_SCALING_NONE = 0,
  MXT_ROPE_SCALING_LINEAR = 1,
  MXT_ROPE_SCALING_LLAMA3 = 2,
} mxt_rope_scaling;
typedef enum mxt_activation {
  MXT_ACTIVATION_GELU_TANH = 0,
  MXT_ACTIVATION_GELU = 1,
} mxt_activation;
typedef enum mxt_dtype {
  MXT_DTYPE_F32 = 0,
} mxt_dtype;
typedef enum mxt_lora_layer {
  MXT_LORA_LAYER_ATTN_C_ATTN = 1,
  MXT_LORA_LAYER_ATTN_C_PROJ = 2,
  MXT_LORA_LAYER_MLP_C_FC = 4,
  MXT_LORA_LAYER_MLP_C_PROJ = 8,
} mxt_lora_layer;
typedef enum mxt_stored_weights {
  MXT_STORED_WEIGHTS_F32 = 0,
  MXT_STORED_WEIGHTS_F16 = 1,
  MXT_STORED_WEIGHTS_BF16 = 2,
  MXT_STORED_WEIGHTS_MXFP4 = 3,
} mxt_stored_weights;
typedef enum mxt_decoder_weights {
  MXT_DECODER_WEIGHTS_F32 = 0,
  MXT_DECODER_WEIGHTS_BF16 = 1,
  MXT_DECODER_WEIGHTS_MXFP4 = 2,
} mxt_decoder_weights;
typedef enum mxt_draft {
  MXT_DRAFT_NONE = 0,
  MXT_DRAFT_NGRAM = 1,
  MXT_DRAFT_MXFP4 = 2,
  MXT_DRAFT_MXFP4_NGRAM = 3,
} mxt_draft;
typedef enum mxt_token_type {
  MXT_TOKEN_TYPE_AUTO = 0,
  MXT_TOKEN_TYPE_U16 = 1,
  MXT_TOKEN_TYPE_U32 = 2,
  MXT_TOKEN_TYPE_I64 = 3,
  MXT_TOKEN_TYPE_U8 = 4,
  MXT_TOKEN_TYPE_I32 = 5,
} mxt_token_type;
typedef enum mxt_schedule {
  MXT_SCHEDULE_CONSTANT = 0,
  MXT_SCHEDULE_COSINE = 1,
  MXT_SCHEDULE_LINEAR = 2,
  MXT_SCHEDULE_TRAPEZOID = 3,
} mxt_schedule;
typedef enum mxt_transport {
  MXT_TRANSPORT_AUTO = 0,
  MXT_TRANSPORT_HOST = 1,
  MXT_TRANSPORT_NCCL = 2,
  MXT_TRANSPORT_PEER = 3,
} mxt_transport;
typedef enum mxt_wire {
  MXT_WIRE_F32 = 0,
  MXT_WIRE_BF16 = 1,
  MXT_WIRE_FP8 = 2,
  MXT_WIRE_MXFP4 = 3,
} mxt_wire;
typedef enum mxt_run_end {
  MXT_RUN_END_FINISHED = 0,
  MXT_RUN_END_CALLBACK = 1,
  MXT_RUN_END_REQUEST = 2,
} mxt_run_end;
typedef struct mxt_dataset mxt_dataset;
typedef struct mxt_decoder mxt_decoder;
typedef struct mxt_engine mxt_engine;
typedef struct mxt_files mxt_files;
typedef struct mxt_model mxt_model;
typedef struct mxt_snapshot mxt_snapshot;
typedef struct mxt_trainer mxt_trainer;
typedef int32_t mxt_status;
typedef int32_t (*mxt_all_to_all_fn)(void *user_data,
                                     const void *send,
                                     void *receive,
                                     size_t bytes_per_rank);
typedef int32_t (*mxt_all_gather_fn)(void *user_data,
                                     const void *send,
                                     void *receive,
                                     size_t bytes_per_rank);
typedef void (*mxt_abort_fn)(void *user_data);
typedef void (*mxt_user_data_free_fn)(void *user_data);
typedef struct mxt_group {
  size_t struct_size;
  uint32_t rank;
  uint32_t size;
  mxt_all_to_all_fn all_to_all;
  mxt_all_gather_fn all_gather;
  mxt_abort_fn abort;
  void *user_data;
  mxt_user_data_free_fn user_data_free;
  uint64_t timeout_seconds;
  int32_t transport;
  int32_t shard_states;
  int32_t gradient_wire;
  int32_t reserved;
} mxt_group;
typedef void (*mxt_log_fn)(void *user_data, int32_t level, const char *message);
typedef void *(*mxt_allocate_fn)(void *user_data, size_t bytes, size_t alignment);
typedef void (*mxt_deallocate_fn)(void *user_data, void *memory, size_t bytes, size_t alignment);
typedef struct mxt_engine_options {
  size_t struct_size;
  const char *device;
  size_t threads;
  uint64_t seed;
  uint64_t memory_limit;
  mxt_log_fn log;
  void *log_user_data;
  void *cuda_stream;
  mxt_user_data_free_fn log_user_data_free;
  const struct mxt_group *group;
  mxt_allocate_fn allocate;
  mxt_deallocate_fn deallocate;
  void *allocator_user_data;
  mxt_user_data_free_fn allocator_user_data_free;
} mxt_engine_options;
typedef struct mxt_memory_use {
  size_t struct_size;
  uint64_t device_bytes;
  uint64_t device_peak;
  uint64_t device_limit;
  uint64_t host_bytes;
  uint64_t host_peak;
  uint64_t host_limit;
} mxt_memory_use;
typedef struct mxt_model_config {
  size_t struct_size;
  size_t vocab_size;
  size_t context_length;
  size_t layers;
  size_t heads;
  size_t channels;
  float layer_norm_epsilon;
  int32_t architecture;
  size_t mlp_channels;
  int32_t activation;
  int32_t tied_head;
  int32_t scale_attention;
  int32_t scale_attention_by_layer;
  size_t lora_rank;
  float lora_alpha;
  uint32_t lora_layers;
  size_t kv_heads;
  size_t head_size;
  double rope_theta;
  size_t rope_original_context;
  int32_t qkv_bias;
  int32_t qk_norm;
  int32_t rope_scaling;
  float rope_factor;
  float rope_low_frequency;
  float rope_high_frequency;
} mxt_model_config;
typedef struct mxt_tensor_info {
  size_t struct_size;
  const char *name;
  uint64_t element_count;
  uint64_t shape[4];
  uint32_t rank;
  int32_t dtype;
} mxt_tensor_info;
typedef int32_t (*mxt_token_fn)(void *user_data, uint32_t token);
typedef struct mxt_generate_options {
  size_t struct_size;
  size_t max_tokens;
  size_t top_k;
  uint64_t seed;
  float temperature;
  float top_p;
  mxt_token_fn on_token;
  void *user_data;
  const uint32_t *stop_tokens;
  size_t stop_token_count;
  float min_p;
  float repetition_penalty;
  int32_t weights;
  int32_t slide;
  int32_t draft;
  uint32_t draft_tokens;
  uint64_t *drafted;
  uint64_t *accepted;
} mxt_generate_options;
typedef struct mxt_decoder_options {
  size_t struct_size;
  size_t sequences;
  size_t room;
  int32_t weights;
  int32_t drafts;
} mxt_decoder_options;
typedef struct mxt_dataset_options {
  size_t struct_size;
  int32_t token_type;
  int32_t reserved;
} mxt_dataset_options;
typedef int32_t (*mxt_window_fn)(void *user_data,
                                 uint64_t number,
                                 uint32_t *tokens,
                                 float *weights,
                                 size_t sequence_length);
typedef int32_t (*mxt_packed_window_fn)(void *user_data,
                                        uint64_t number,
                                        uint32_t *tokens,
                                        float *weights,
                                        uint32_t *documents,
                                        size_t sequence_length);
typedef struct mxt_coverage {
  size_t struct_size;
  uint64_t windows;
  uint64_t files;
  uint64_t short_files;
  uint64_t tokens;
  uint64_t short_tokens;
  uint64_t shortest;
  uint64_t longest;
} mxt_coverage;
typedef struct mxt_trainer_options {
  size_t struct_size;
  size_t batch_size;
  size_t sequence_length;
  size_t accumulation;
  const char *recipe;
  float beta1;
  float beta2;
  float epsilon;
  float weight_decay;
  float clip;
  int32_t schedule;
  float lr;
  float min_lr;
  uint64_t warmup_steps;
  uint64_t total_steps;
  uint64_t decay_steps;
  const char *recompute;
  const char *optimizer;
  const char *token_drop;
  size_t lanes;
  const char *frozen;
  int32_t has_document_end;
  uint32_t document_end;
} mxt_trainer_options;
typedef struct mxt_step_stats {
  size_t struct_size;
  uint64_t step;
  uint64_t tokens;
  double seconds;
  float loss;
  float grad_norm;
  float lr;
  float tokens_per_second;
  uint64_t raised_blocks;
  float update_rms_max;
  uint32_t update_rms_tensor;
  double exchange_seconds;
} mxt_step_stats;
typedef struct mxt_eval_stats {
  size_t struct_size;
  uint64_t tokens;
  double seconds;
  float loss;
  float perplexity;
  float sharpness;
  float sharpness_last;
  float sharpness_epsilon;
  float logit_amax;
  double spared_products;
  double spared_all;
} mxt_eval_stats;
typedef struct mxt_memory_plan {
  size_t struct_size;
  uint64_t weights;
  uint64_t gradients;
  uint64_t optimizer;
  uint64_t activations;
  uint64_t workspace;
  uint64_t total;
  uint64_t exchange;
} mxt_memory_plan;
typedef struct mxt_logits {
  size_t struct_size;
  float *logits;
  float *losses;
  uint64_t first_row;
  uint64_t rows;
  uint64_t vocab_size;
} mxt_logits;
typedef int32_t (*mxt_loss_fn)(void *user_data, const struct mxt_logits *rows);
typedef struct mxt_batch {
  size_t struct_size;
  size_t count;
  const uint32_t *tokens;
  const uint32_t *targets;
  const float *weights;
  double divisor;
  float *losses;
  mxt_loss_fn loss;
  void *user_data;
  const uint32_t *documents;
} mxt_batch;
typedef int32_t (*mxt_file_open_fn)(void *user_data, const char *name, void **file, uint64_t *size);
typedef int32_t (*mxt_file_read_fn)(void *user_data,
                                    void *file,
                                    uint64_t offset,
                                    void *to,
                                    size_t count);
typedef int32_t (*mxt_file_close_fn)(void *user_data, void *file);
typedef int32_t (*mxt_files_begin_fn)(void *user_data);
typedef int32_t (*mxt_file_create_fn)(void *user_data, const char *name, uint64_t size, void **file);
typedef int32_t (*mxt_file_write_fn)(void *user_data, void *file, const void *from, size_t count);
typedef int32_t (*mxt_files_commit_fn)(void *user_data);
typedef void (*mxt_files_abort_fn)(void *user_data);
typedef const char *(*mxt_files_error_fn)(void *user_data);
typedef struct mxt_file_callbacks {
  size_t struct_size;
  void *user_data;
  mxt_file_open_fn open;
  mxt_file_read_fn read;
  mxt_file_close_fn close;
  mxt_files_begin_fn begin;
  mxt_file_create_fn create;
  mxt_file_write_fn write;
  mxt_files_commit_fn commit;
  mxt_files_abort_fn abort;
  mxt_files_error_fn error;
  mxt_user_data_free_fn user_data_free;
} mxt_file_callbacks;
typedef struct mxt_tensor_update {
  size_t struct_size;
  uint64_t step;
  float grad_norm;
  float rms;
} mxt_tensor_update;
typedef struct mxt_weight_metrics {
  size_t struct_size;
  uint64_t step;
  uint64_t steps;
  double change;
  double rounded_change;
  double flipped;
  double confidence;
  double oscillating;
  double clipped;
  float amax;
  uint32_t tensors;
} mxt_weight_metrics;
typedef int32_t (*mxt_step_fn)(void *user_data,
                               const struct mxt_step_stats *step,
                               const struct mxt_eval_stats *eval);
typedef struct mxt_run_options {
  size_t struct_size;
  uint64_t steps;
  const struct mxt_dataset *eval_dataset;
  uint64_t eval_every;
  size_t eval_batches;
  const char *save_dir;
  uint64_t save_every;
  mxt_step_fn on_step;
  void *user_data;
  struct mxt_files *save_files;
} mxt_run_options;
typedef struct mxt_run_result {
  size_t struct_size;
  uint64_t steps;
  uint64_t tokens;
  double seconds;
  float last_loss;
  float last_eval_loss;
  int32_t end;
  int32_t saved;
  uint64_t eval_errors;
  uint64_t save_errors;
} mxt_run_result;
const char *mxt_status_string(mxt_status status);
const char *mxt_version(void);
uint32_t mxt_version_number(void);
uint32_t mxt_abi_version(void);
const char *mxt_build_info(void);
const char *mxt_last_error(void);
mxt_status mxt_group_init(struct mxt_group *group, size_t struct_size);
mxt_status mxt_engine_options_init(struct mxt_engine_options *options, size_t struct_size);
mxt_status mxt_engine_new(const struct mxt_engine_options *options, struct mxt_engine **engine);
mxt_status mxt_engine_memory(const struct mxt_engine *engine, struct mxt_memory_use *memory);
const char *mxt_engine_device(const struct mxt_engine *engine);
size_t mxt_engine_threads(const struct mxt_engine *engine);
uint64_t mxt_engine_seed(const struct mxt_engine *engine);
size_t mxt_engine_rank(const struct mxt_engine *engine);
size_t mxt_engine_ranks(const struct mxt_engine *engine);
const char *mxt_engine_last_error(const struct mxt_engine *engine);
void mxt_engine_free(struct mxt_engine *engine);
mxt_status mxt_model_config_init(struct mxt_model_config *config, size_t struct_size);
mxt_status mxt_model_new(const struct mxt_engine *engine,
                         const struct mxt_model_config *config,
                         struct mxt_model **model);
mxt_status mxt_model_load(const struct mxt_engine *engine,
                          const char *dir,
                          struct mxt_model **model);
mxt_status mxt_model_save(const struct mxt_model *model, const char *dir);
mxt_status mxt_model_with_lora(const struct mxt_model *model,
                               size_t rank,
                               float alpha,
                               uint32_t layers,
                               struct mxt_model **adapted);
mxt_status mxt_model_merge_lora(const struct mxt_model *model,
                                struct mxt_model **merged);
mxt_status mxt_model_save_lora(const struct mxt_model *model, const char *dir);
mxt_status mxt_model_load_lora(const struct mxt_model *model,
                               const char *dir,
                               struct mxt_model **adapted);
mxt_status mxt_model_save_as(const struct mxt_model *model, const char *dir, int32_t weights);
mxt_status mxt_model_get_config(const struct mxt_model *model, struct mxt_model_config *config);
uint64_t mxt_model_parameter_count(const struct mxt_model *model);
size_t mxt_model_tensor_count(const struct mxt_model *model);
mxt_status mxt_model_tensor_info(const struct mxt_model *model,
                                 size_t index,
                                 struct mxt_tensor_info *info);
mxt_status mxt_model_tensor_read(const struct mxt_model *model,
                                 const char *name,
                                 float *values,
                                 size_t count);
mxt_status mxt_model_tensor_write(struct mxt_model *model,
                                  const char *name,
                                  const float *values,
                                  size_t count);
const char *mxt_model_last_error(const struct mxt_model *model);
void mxt_model_free(struct mxt_model *model);
mxt_status mxt_generate_options_init(struct mxt_generate_options *options, size_t struct_size);
mxt_status mxt_model_generate(struct mxt_model *model,
                              const struct mxt_generate_options *options,
                              const uint32_t *prompt,
                              size_t prompt_count,
                              uint32_t *tokens,
                              size_t capacity,
                              size_t *written);
mxt_status mxt_model_next_logits(const struct mxt_model *model,
                                 const uint32_t *tokens,
                                 size_t token_count,
                                 float *logits,
                                 size_t count);
mxt_status mxt_model_score(const struct mxt_model *model,
                           int32_t weights,
                           const uint32_t *tokens,
                           size_t token_count,
                           const size_t *lengths,
                           size_t text_count,
                           float *log_probabilities,
                           float *hidden);
mxt_status mxt_decoder_options_init(struct mxt_decoder_options *options, size_t struct_size);
mxt_status mxt_decoder_new(const struct mxt_model *model,
                           const struct mxt_decoder_options *options,
                           struct mxt_decoder **decoder);
mxt_status mxt_decoder_push(struct mxt_decoder *decoder,
                            size_t sequence,
                            const uint32_t *tokens,
                            size_t count);
mxt_status mxt_decoder_logits(struct mxt_decoder *decoder,
                              size_t sequence,
                              float *logits,
                              size_t count);
mxt_status mxt_decoder_logits_from(struct mxt_decoder *decoder,
                                   size_t sequence,
                                   size_t from,
                                   float *logits,
                                   size_t count);
mxt_status mxt_decoder_logits_of(struct mxt_decoder *decoder,
                                 const size_t *sequences,
                                 size_t sequence_count,
                                 float *logits,
                                 size_t count);
mxt_status mxt_decoder_generate_each(struct mxt_decoder *decoder,
                                     const size_t *sequences,
                                     size_t sequence_count,
                                     const struct mxt_generate_options *options,
                                     uint32_t *tokens,
                                     size_t capacity,
                                     size_t *written);
mxt_status mxt_decoder_generate(struct mxt_decoder *decoder,
                                size_t sequence,
                                const struct mxt_generate_options *options,
                                uint32_t *tokens,
                                size_t capacity,
                                size_t *written);
mxt_status mxt_decoder_rewind(struct mxt_decoder *decoder, size_t sequence, size_t len);
mxt_status mxt_decoder_fork(struct mxt_decoder *decoder, size_t from, size_t to);
mxt_status mxt_decoder_tokens(struct mxt_decoder *decoder,
                              size_t sequence,
                              uint32_t *tokens,
                              size_t capacity,
                              size_t *written);
const char *mxt_decoder_last_error(const struct mxt_decoder *decoder);
void mxt_decoder_free(struct mxt_decoder *decoder);
mxt_status mxt_dataset_options_init(struct mxt_dataset_options *options, size_t struct_size);
mxt_status mxt_dataset_open(const char *pattern, struct mxt_dataset **dataset);
mxt_status mxt_dataset_open_with(const char *pattern,
                                 const struct mxt_dataset_options *options,
                                 struct mxt_dataset **dataset);
mxt_status mxt_dataset_open_files(const char *const *paths,
                                  size_t count,
                                  struct mxt_dataset **dataset);
mxt_status mxt_dataset_open_files_with(const char *const *paths,
                                       size_t count,
                                       const struct mxt_dataset_options *options,
                                       struct mxt_dataset **dataset);
mxt_status mxt_dataset_from_tokens(const uint32_t *tokens,
                                   size_t count,
                                   struct mxt_dataset **dataset);
mxt_status mxt_dataset_from_memory(const void *tokens,
                                   size_t count,
                                   int32_t token_type,
                                   void *user_data,
                                   mxt_user_data_free_fn user_data_free,
                                   struct mxt_dataset **dataset);
mxt_status mxt_dataset_from_windows(uint64_t count,
                                    mxt_window_fn fill,
                                    void *user_data,
                                    mxt_user_data_free_fn user_data_free,
                                    struct mxt_dataset **dataset);
mxt_status mxt_dataset_from_packed_windows(uint64_t count,
                                           mxt_packed_window_fn fill,
                                           void *user_data,
                                           mxt_user_data_free_fn user_data_free,
                                           struct mxt_dataset **dataset);
uint64_t mxt_dataset_token_count(const struct mxt_dataset *dataset);
mxt_status mxt_dataset_max_token(const struct mxt_dataset *dataset, uint32_t *token);
mxt_status mxt_dataset_coverage(const struct mxt_dataset *dataset,
                                size_t sequence_length,
                                struct mxt_coverage *coverage);
mxt_status mxt_dataset_read(const struct mxt_dataset *dataset,
                            uint64_t first,
                            size_t count,
                            uint32_t *tokens);
const char *mxt_dataset_last_error(const struct mxt_dataset *dataset);
void mxt_dataset_free(struct mxt_dataset *dataset);
mxt_status mxt_trainer_options_init(struct mxt_trainer_options *options, size_t struct_size);
mxt_status mxt_trainer_new(struct mxt_model *model,
                           const struct mxt_trainer_options *options,
                           struct mxt_trainer **trainer);
mxt_status mxt_trainer_load(const struct mxt_engine *engine,
                            const char *dir,
                            struct mxt_trainer **trainer);
mxt_status mxt_trainer_load_as(const struct mxt_engine *engine,
                               const char *dir,
                               const char *optimizer,
                               struct mxt_trainer **trainer);
mxt_status mxt_trainer_save(struct mxt_trainer *trainer, const char *dir);
mxt_status mxt_trainer_step(struct mxt_trainer *trainer,
                            const struct mxt_dataset *dataset,
                            struct mxt_step_stats *stats);
mxt_status mxt_trainer_step_unless_stopped(struct mxt_trainer *trainer,
                                           const struct mxt_dataset *dataset,
                                           struct mxt_step_stats *stats);
mxt_status mxt_trainer_step_tokens(struct mxt_trainer *trainer,
                                   const uint32_t *tokens,
                                   size_t count,
                                   struct mxt_step_stats *stats);
mxt_status mxt_trainer_eval(struct mxt_trainer *trainer,
                            const struct mxt_dataset *dataset,
                            size_t max_batches,
                            struct mxt_eval_stats *stats);
mxt_status mxt_trainer_set_sharpness(struct mxt_trainer *trainer, float epsilon);
mxt_status mxt_trainer_set_lr(struct mxt_trainer *trainer, float lr);
mxt_status mxt_trainer_set_schedule(struct mxt_trainer *trainer,
                                    const struct mxt_trainer_options *options);
mxt_status mxt_trainer_use_schedule(struct mxt_trainer *trainer);
uint64_t mxt_trainer_schedule_start(const struct mxt_trainer *trainer);
uint64_t mxt_trainer_steps_done(const struct mxt_trainer *trainer);
mxt_status mxt_trainer_model(const struct mxt_trainer *trainer, struct mxt_model **model);
mxt_status mxt_trainer_get_options(const struct mxt_trainer *trainer,
                                   struct mxt_trainer_options *options);
void mxt_trainer_request_stop(const struct mxt_trainer *trainer);
void mxt_trainer_clear_stop(const struct mxt_trainer *trainer);
const char *mxt_trainer_last_error(const struct mxt_trainer *trainer);
void mxt_trainer_free(struct mxt_trainer *trainer);
mxt_status mxt_plan(const struct mxt_engine *engine,
                    const struct mxt_model_config *config,
                    const struct mxt_trainer_options *options,
                    struct mxt_memory_plan *result);
mxt_status mxt_batch_init(struct mxt_batch *batch,
                          size_t struct_size);
mxt_status mxt_trainer_forward_backward(struct mxt_trainer *trainer,
                                        const struct mxt_batch *batch);
mxt_status mxt_trainer_forward(struct mxt_trainer *trainer,
                               const struct mxt_batch *batch,
                               struct mxt_eval_stats *stats);
mxt_status mxt_trainer_update(struct mxt_trainer *trainer, struct mxt_step_stats *stats);
mxt_status mxt_trainer_zero_gradients(struct mxt_trainer *trainer);
mxt_status mxt_trainer_scale_gradients(struct mxt_trainer *trainer,
                                       const char *tensor,
                                       float factor);
mxt_status mxt_trainer_is_trained(struct mxt_trainer *trainer,
                                  const char *tensor,
                                  int32_t *is_trained);
mxt_status mxt_trainer_read_gradient(struct mxt_trainer *trainer,
                                     const char *tensor,
                                     float *values,
                                     size_t count);
mxt_status mxt_trainer_write_gradient(struct mxt_trainer *trainer,
                                      const char *tensor,
                                      const float *values,
                                      size_t count);
mxt_status mxt_trainer_snapshot(struct mxt_trainer *trainer,
                                struct mxt_snapshot **snapshot);
mxt_status mxt_snapshot_renew(struct mxt_snapshot *snapshot,
                              struct mxt_trainer *trainer);
mxt_status mxt_snapshot_save(struct mxt_snapshot *snapshot,
                             const char *dir);
const char *mxt_snapshot_last_error(const struct mxt_snapshot *snapshot);
void mxt_snapshot_free(struct mxt_snapshot *snapshot);
mxt_status mxt_file_callbacks_init(struct mxt_file_callbacks *callbacks, size_t struct_size);
mxt_status mxt_files_from_callbacks(const struct mxt_file_callbacks *callbacks,
                                    struct mxt_files **files);
mxt_status mxt_files_in_memory(struct mxt_files **files);
size_t mxt_files_count(const struct mxt_files *files);
const char *mxt_files_name(const struct mxt_files *files, size_t index);
mxt_status mxt_files_view(const struct mxt_files *files,
                          const char *name,
                          const void **bytes,
                          size_t *count);
mxt_status mxt_files_put(struct mxt_files *files,
                         const char *name,
                         const void *bytes,
                         size_t count);
mxt_status mxt_files_lend(struct mxt_files *files,
                          const char *name,
                          const void *bytes,
                          size_t count,
                          void *user_data,
                          mxt_user_data_free_fn user_data_free);
mxt_status mxt_files_remove(struct mxt_files *files, const char *name);
mxt_status mxt_model_load_from(const struct mxt_engine *engine,
                               struct mxt_files *files,
                               struct mxt_model **model);
mxt_status mxt_model_save_to(const struct mxt_model *model,
                             struct mxt_files *files,
                             int32_t weights);
mxt_status mxt_model_load_lora_from(const struct mxt_model *model,
                                    struct mxt_files *files,
                                    struct mxt_model **adapted);
mxt_status mxt_model_save_lora_to(const struct mxt_model *model,
                                  struct mxt_files *files);
mxt_status mxt_trainer_load_from(const struct mxt_engine *engine,
                                 struct mxt_files *files,
                                 const char *optimizer,
                                 struct mxt_trainer **trainer);
mxt_status mxt_trainer_save_to(struct mxt_trainer *trainer, struct mxt_files *files);
mxt_status mxt_snapshot_save_to(struct mxt_snapshot *snapshot, struct mxt_files *files);
const char *mxt_files_last_error(const struct mxt_files *files);
void mxt_files_free(struct mxt_files *files);
mxt_status mxt_trainer_watch_updates(struct mxt_trainer *trainer, uint64_t every);
mxt_status mxt_trainer_tensor_update(struct mxt_trainer *trainer,
                                     const char *tensor,
                                     struct mxt_tensor_update *update);
mxt_status mxt_trainer_watch_weights(struct mxt_trainer *trainer, uint64_t every);
mxt_status mxt_trainer_weight_metrics(struct mxt_trainer *trainer,
                                      const char *tensor,
                                      struct mxt_weight_metrics *metrics);
mxt_status mxt_run_options_init(struct mxt_run_options *options, size_t struct_size);
mxt_status mxt_trainer_run(struct mxt_trainer *trainer,
                           const struct mxt_dataset *dataset,
                           const struct mxt_run_options *options,
                           struct mxt_run_result *result);
"""
