/* Ask a model of a bundle a question: sparse kernels where they pay, text as it comes.
 *
 *     ask model.gguf "What is 12 times 34?" [folder for packed weights]
 */
#include <llama.h>
#include <racdeploy.h>
#include <stdio.h>
#include <string.h>

enum { CONTEXT = 1024, MOST_PROMPT = 4096 };

/* Without a line for every tensor. */
static void log_errors(enum ggml_log_level level, const char *text, void *unused) {
    (void)unused;
    if (level == GGML_LOG_LEVEL_ERROR) fputs(text, stderr);
}

/* Before llama.cpp loads its first model. It is no error where nothing is gained: the app runs either way. */
static int enable_kernels(const char *path, const char *kept_folder) {
    const racdeploy_options options = {.kept_folder = kept_folder};
    racdeploy_model *model;
    int failed = racdeploy_open(path, &options, &model) || racdeploy_enable(model);
    if (failed) fprintf(stderr, "racdeploy: %s\n", racdeploy_last_error());
    if (!failed && *racdeploy_why_not(model)) fprintf(stderr, "kernels: llama.cpp's own: %s\n", racdeploy_why_not(model));
    racdeploy_close(model);
    return failed;
}

/* libllama knows the common templates by their marks, and no opened thinking: that of the file says whether it is. */
static int write_prompt(const struct llama_model *model, const char *question, char *prompt) {
    const char *form = llama_model_chat_template(model, NULL);
    const struct llama_chat_message message = {"user", question};
    int length = llama_chat_apply_template(form, &message, 1, true, prompt, MOST_PROMPT - 16);
    if (length < 0 || length > MOST_PROMPT - 16) return 0;
    if (form && strstr(form, "assistant\n<think>\n")) length += sprintf(prompt + length, "<think>\n");
    return length;
}

static int answer(struct llama_model *model, const char *question) {
    const struct llama_vocab *vocab = llama_model_get_vocab(model);
    struct llama_context_params params = llama_context_default_params();
    params.n_ctx = CONTEXT;
    params.flash_attn_type = LLAMA_FLASH_ATTN_TYPE_DISABLED; /* as racdeploy run: it changes what is answered */
    struct llama_context *context = llama_init_from_model(model, params);
    struct llama_sampler *greedy = llama_sampler_init_greedy();
    char prompt[MOST_PROMPT], piece[256];
    llama_token tokens[CONTEXT];
    int count = llama_tokenize(vocab, prompt, write_prompt(model, question, prompt), tokens, CONTEXT, false, true);

    for (int used = 0; context && count > 0 && (used += count) < CONTEXT; count = 1) {
        if (llama_decode(context, llama_batch_get_one(tokens, count))) break;
        tokens[0] = llama_sampler_sample(greedy, context, -1);
        if (llama_vocab_is_eog(vocab, tokens[0])) break;
        int bytes = llama_token_to_piece(vocab, tokens[0], piece, sizeof piece, 0, true);
        if (bytes > 0) fwrite(piece, 1, (size_t)bytes, stdout);
        fflush(stdout);
    }
    putchar('\n');
    llama_sampler_free(greedy);
    llama_free(context);
    return context && count > 0 ? 0 : 1;
}

int main(int count, char **arguments) {
    if (count < 3) return fprintf(stderr, "usage: ask MODEL QUESTION [FOLDER]\n"), 2;
    llama_log_set(log_errors, NULL);
    llama_backend_init();
    if (enable_kernels(arguments[1], count > 3 ? arguments[3] : NULL)) return 1;

    struct llama_model_params params = llama_model_default_params();
    struct llama_model *model = llama_model_load_from_file(arguments[1], params);
    if (!model) return fprintf(stderr, "llama.cpp cannot load %s\n", arguments[1]), 1;
    fprintf(stderr, "kernels: %lld weights on %s\n", (long long)racdeploy_packed(), racdeploy_instruction_set());
    int failed = answer(model, arguments[2]);
    llama_model_free(model);
    return failed;
}
