/* Calls what libracdeploy has for models, for the tests. The last line is a status and its message.
 *
 *   models choose GGUF SHARE [FOLDER]   names of the weights with so many zeros, or the reason for none
 *   models enable GGUF SHARE FOLDER     the same, and enables them: the kept file is written or found
 *   models late GGUF                    enables after a model was loaded
 *   models forget GGUF FOLDER
 *   models measure                      the thresholds
 *   models misuse
 *
 * SHARE is that of every number format, or as bf16=0.3 of this one, and nothing of the others; or `default`: the
 * thresholds that are built in.
 */
#ifndef WITHOUT_LLAMA
#include <llama.h>
#endif
#include <racdeploy.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#ifndef WITHOUT_LLAMA
static void say_nothing(enum ggml_log_level level, const char *text, void *unused) {
    (void)level, (void)text, (void)unused;
}
#endif

static int finish(racdeploy_status status) {
    printf("%d %s\n", status, status ? racdeploy_last_error() : "");
    return 0;
}

static int choose(const char *gguf, const char *share, const char *folder, int enable) {
    double from = atof(share);
    racdeploy_thresholds thresholds = {from, from, from, from, from, from, from, from};
    racdeploy_options options = {0};
    racdeploy_model *model;
    racdeploy_status status;
    int64_t i;

    if (!strncmp(share, "bf16=", 5)) {
        memset(&thresholds, 0, sizeof thresholds);
        thresholds.bf16 = atof(share + 5);
    }
    options.thresholds = strcmp(share, "default") ? &thresholds : NULL;
    options.kept_folder = folder;
    options.keep_in_small_pages = 1;
    options.threads = 2;
    status = racdeploy_open(gguf, &options, &model);
    thresholds.q8_0 = 9; /* it was copied */
    if (!status && enable) status = racdeploy_enable(model);
    for (i = 0; i < racdeploy_weights(model); i++) puts(racdeploy_weight_name(model, i));
    if (!status && *racdeploy_why_not(model)) puts(racdeploy_why_not(model));
    racdeploy_close(model);
    return finish(status);
}

#ifndef WITHOUT_LLAMA
static int late(const char *gguf) {
    struct llama_model_params params = llama_model_default_params();
    struct llama_model *loaded = llama_model_load_from_file(gguf, params);
    racdeploy_thresholds thresholds = {0.3, 0.3, 0.3, 0.3, 0.3, 0.3, 0.3, 0.3};
    racdeploy_options options = {0};
    racdeploy_model *model;
    racdeploy_status status;

    options.thresholds = &thresholds;
    status = racdeploy_open(gguf, &options, &model);
    if (!status) status = racdeploy_enable(model);
    puts(racdeploy_why_not(model));
    racdeploy_close(model);
    llama_model_free(loaded);
    return finish(status);
}
#endif

static int misuse(void) {
    racdeploy_model *model = (racdeploy_model *)&model;
    int wrong = 0;
    wrong += racdeploy_open("nowhere", NULL, NULL) != RACDEPLOY_USAGE;
    wrong += racdeploy_open(NULL, NULL, &model) != RACDEPLOY_USAGE || model != NULL;
    wrong += racdeploy_open("nowhere", NULL, &model) != RACDEPLOY_SYSTEM;
    wrong += !*racdeploy_why_not(NULL) || racdeploy_weights(NULL) != 0 || racdeploy_weight_name(NULL, 0) != NULL;
    wrong += racdeploy_enable(NULL) != RACDEPLOY_USAGE;
    wrong += racdeploy_forget("nowhere", NULL) != RACDEPLOY_USAGE;
    wrong += racdeploy_forget("nowhere", "/") != RACDEPLOY_OK;
    wrong += racdeploy_measure(1, NULL) != RACDEPLOY_USAGE;
    wrong += !*racdeploy_instruction_set() || racdeploy_packed() != 0;
    racdeploy_close(NULL);
    return wrong;
}

static int measure(void) {
    racdeploy_thresholds found;
    racdeploy_status status = racdeploy_measure(1, &found);
    printf("%g %g %g %g %g %g %g %g\n", found.q8_0, found.q8_0_two_of_four, found.q4_0, found.f16, found.bf16,
           found.q4_0_two_of_four, found.q3_k_two_of_four, found.q6_k_two_of_four);
    return finish(status);
}

int main(int count, char **arguments) {
    const char *command = count > 1 ? arguments[1] : "";
#ifndef WITHOUT_LLAMA
    llama_log_set(say_nothing, NULL);
    if (!strcmp(command, "late") && count > 2) return late(arguments[2]);
#endif
    if (!strcmp(command, "choose") && count > 3) return choose(arguments[2], arguments[3], arguments[4], 0);
    if (!strcmp(command, "enable") && count > 4) return choose(arguments[2], arguments[3], arguments[4], 1);
    if (!strcmp(command, "forget") && count > 3) return finish(racdeploy_forget(arguments[2], arguments[3]));
    if (!strcmp(command, "measure")) return measure();
    if (!strcmp(command, "misuse")) return misuse();
    return 100;
}
