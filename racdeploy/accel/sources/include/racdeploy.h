/* libracdeploy: racdeploy's files and sparse kernels in apps that embed llama.cpp. C99; no Python, nothing to install.
 *
 * Errors    A function that returns racdeploy_status returns RACDEPLOY_OK (0) where it succeeded. Otherwise
 *           racdeploy_last_error() says in one line what is wrong and what to do. No C++ exception leaves the library,
 *           and it prints nothing. Only where memory ends while llama.cpp loads packed weights the process ends, as
 *           ggml ends it there.
 * Ownership Strings and structs that are passed in are copied where they are needed later. Returned strings belong to
 *           the library: never free one. Only racdeploy_model has to be closed.
 * Threads   Every function may be called on any thread at any time, but one racdeploy_model by one thread at a time.
 *           From racdeploy_enable() to the end of the load that it is for, load no other model in the process, and do
 *           not call racdeploy_measure(): what was enabled would be forgotten.
 * Paths     are UTF-8, as the system's open() takes them.
 */
#ifndef RACDEPLOY_H
#define RACDEPLOY_H

#include <stdint.h>

#if defined(RACDEPLOY_SHARED) && defined(__GNUC__)
#define RACDEPLOY_API __attribute__((visibility("default")))
#else
#define RACDEPLOY_API
#endif

#ifdef __cplusplus
extern "C" {
#endif

typedef enum racdeploy_status {
    RACDEPLOY_OK = 0,
    RACDEPLOY_USAGE = 1,   /* an argument that no call can have */
    RACDEPLOY_DAMAGED = 2, /* the file is no such file, or damaged, or made to harm */
    RACDEPLOY_SYSTEM = 3,  /* it cannot be read or written: no such file, no permission, no space */
    RACDEPLOY_MEMORY = 4,  /* there is not enough memory */
    RACDEPLOY_ENGINE = 5   /* this llama.cpp does not take the kernels, or they are not in this build */
} racdeploy_status;

/* Return the version of the library, as "0.1.0". The string stays valid. */
RACDEPLOY_API const char *racdeploy_version(void);

/* Return why the call before this one failed, on the same thread; "" before the first call. ASCII, one line.
 * The string is valid until the next call on the thread. */
RACDEPLOY_API const char *racdeploy_last_error(void);

/* ---- Containers: a .racgguf file is a GGUF file without its zeros -------------------------------------------------
 * Memory stays below 4 MB whatever the size of the model. Damaged and hostile files are refused: header and sizes
 * before anything is written, chunks as they are unpacked, and the SHA-256 of the whole at the end. */

/* Store in *size_bytes how long the plain GGUF file of a container will be; the header is checked, the chunks are not.
 * RACDEPLOY_DAMAGED also where `container` is a plain GGUF file already: use that as it is. */
RACDEPLOY_API racdeploy_status racdeploy_plain_size(const char *container, uint64_t *size_bytes);

/* Write the plain GGUF file of a container to `out`, whole or not at all; a file of that name is replaced.
 * While it works, there is a file `out` with ".RANDOM.partial" behind its name, which a killed process leaves there.
 * Several may write the same file at the same time. */
RACDEPLOY_API racdeploy_status racdeploy_unpack(const char *container, const char *out);

/* The same from an open file to another, a pipe or a socket: Android's storage framework gives descriptors, no paths.
 * `container` has to be seekable, and is read from its first byte on; `out` is written where it is. Both stay open and
 * belong to the caller. Unless the result is RACDEPLOY_OK, throw away what was written: it may be wrong. A pipe whose
 * reader is gone raises SIGPIPE, unless the process ignores that. */
RACDEPLOY_API racdeploy_status racdeploy_unpack_descriptor(int container, int out);

/* ---- Sparse kernels inside llama.cpp ------------------------------------------------------------------------------
 * racdeploy_open(), racdeploy_enable(), llama_model_load_from_file(), racdeploy_close(): the weights with enough zeros
 * of this one load are packed, and llama.cpp multiplies by them with the sparse kernels. Enable before the process
 * loads its first model: ggml hands out its list of buffer types then. */

/* The shares of zeros from which on the weights of a number format run on the sparse kernels; more than 1, or 0 or
 * less: never. So a format that an initializer leaves out is never packed; later versions add theirs at the end.
 * `two_of_four` is for weights with two zeros in every four; Q3_K and Q6_K are packed in that pattern alone. */
typedef struct racdeploy_thresholds {
    double q8_0, q8_0_two_of_four, q4_0, f16, bf16, q4_0_two_of_four, q3_k_two_of_four, q6_k_two_of_four;
} racdeploy_thresholds;

/* How a model is opened. All zeros, or NULL in place of the struct, are the defaults. */
typedef struct racdeploy_options {
    /* NULL: those that racdeploy_measure() found earlier in this process, else built-in ones, which were measured with
     * AVX-512. On any other processor these say "never": measure once, keep the struct, and pass it. */
    const racdeploy_thresholds *thresholds;
    /* A folder of the app's own in which packed weights are kept, so that the next start maps them; NULL keeps none.
     * It has to exist, and nobody else may write there. The file takes 0.55 to 0.8 times the bytes of the model. */
    const char *kept_folder;
    /* Without it, no file is kept where the system would map it in 4 KB pages, from which products are slower. */
    int keep_in_small_pages;
    /* That count zeros and pack; 0: one for every core. */
    int threads;
} racdeploy_options;

/* A GGUF file, and which of its weights go to the kernels. */
typedef struct racdeploy_model racdeploy_model;

/* Open a GGUF file and choose its weights, whose zeros are counted: that reads the file once, unless a kept file knows
 * them already. Store in *model what racdeploy_close() has to free, NULL unless the result is RACDEPLOY_OK.
 * It is no error where nothing is to be gained: racdeploy_why_not() says so then. */
RACDEPLOY_API racdeploy_status racdeploy_open(const char *gguf, const racdeploy_options *options,
                                              racdeploy_model **model);

/* Return in one line why llama.cpp's own kernels run the model; "" where the sparse ones take part.
 * The string is valid until the model is closed or enabled. NULL for a model is answered, too. */
RACDEPLOY_API const char *racdeploy_why_not(const racdeploy_model *model);

/* Return how many weights were chosen; their names in order for `index` below that, NULL otherwise.
 * The name is valid until the model is closed. */
RACDEPLOY_API int64_t racdeploy_weights(const racdeploy_model *model);
RACDEPLOY_API const char *racdeploy_weight_name(const racdeploy_model *model, int64_t index);

/* Have the weights packed by the next load of llama.cpp, or mapped from the kept file, which is written here where it
 * is wanted and missing (as long as packing takes). Where racdeploy_why_not() has a reason, this does nothing and
 * succeeds: the app runs either way. RACDEPLOY_ENGINE where a model was loaded in this process before. */
RACDEPLOY_API racdeploy_status racdeploy_enable(racdeploy_model *model);

/* Return how many weights the kernels have taken since the last racdeploy_enable() of this process. */
RACDEPLOY_API int64_t racdeploy_packed(void);

/* Free a model, before or after llama.cpp's own: llama.cpp keeps what it uses. NULL is allowed. */
RACDEPLOY_API void racdeploy_close(racdeploy_model *model);

/* Delete the kept file of a GGUF file, which need not exist any more, from a folder. RACDEPLOY_OK where there is
 * none. */
RACDEPLOY_API racdeploy_status racdeploy_forget(const char *gguf, const char *kept_folder);

/* Return the kernels that this processor gets, as "avx512", "avx2", "neon" or "portable"; "" where they are not in this
 * build. The string stays valid. */
RACDEPLOY_API const char *racdeploy_instruction_set(void);

/* Compare every kernel with ggml's own products, then measure both, in this process; before the first model is loaded.
 * `threads` are those that llama.cpp will use, 0 one for every core: cores share the memory, which is what zeros save.
 * It takes half a minute or so, and some 200 MB. Store in *thresholds from which zeros on the kernels are at least 5 %
 * faster; keep that until the app or the system is updated. RACDEPLOY_ENGINE where a product differs, RACDEPLOY_SYSTEM
 * where other programs kept the cores busy. */
RACDEPLOY_API racdeploy_status racdeploy_measure(int threads, racdeploy_thresholds *thresholds);

#ifdef __cplusplus
}
#endif

#endif
