/* Calls libracdeploy as an app does, for the tests.
 *
 *   driver unpack CONTAINER OUT …   for each pair one line: status, size of the plain file, message
 *   driver pipe < CONTAINER         the plain file on stdout; the status is the exit code
 *   driver misuse                   calls that no program should make
 */
#define _POSIX_C_SOURCE 200809L
#include <stdio.h>
#include <string.h>

#include <racdeploy.h>

static void unpack(const char *container, const char *out) {
    uint64_t size_bytes = 0;
    racdeploy_status status = racdeploy_plain_size(container, &size_bytes);
    if (status == RACDEPLOY_OK) status = racdeploy_unpack(container, out);
    printf("%d %lu %s\n", status, (unsigned long)size_bytes, status ? racdeploy_last_error() : "");
}

static int misuse(void) {
    uint64_t size_bytes = 7;
    int wrong = 0;
    wrong += *racdeploy_last_error() != 0 || !*racdeploy_version();
    wrong += racdeploy_plain_size(NULL, &size_bytes) != RACDEPLOY_USAGE || size_bytes != 0;
    wrong += racdeploy_plain_size("nowhere", NULL) != RACDEPLOY_USAGE;
    wrong += racdeploy_plain_size("nowhere", &size_bytes) != RACDEPLOY_SYSTEM;
    wrong += strstr(racdeploy_last_error(), "nowhere cannot be opened: No such file") == NULL;
    wrong += racdeploy_unpack(NULL, "out") != RACDEPLOY_USAGE;
    wrong += racdeploy_unpack("", "out") != RACDEPLOY_USAGE;
    wrong += racdeploy_unpack("nowhere", NULL) != RACDEPLOY_USAGE;
    wrong += racdeploy_unpack("/", "out") != RACDEPLOY_DAMAGED;
    wrong += racdeploy_unpack("/dev/zero", "out") != RACDEPLOY_DAMAGED;
    wrong += racdeploy_unpack_descriptor(-1, 1) != RACDEPLOY_SYSTEM;
    return wrong;
}

int main(int count, char **arguments) {
    const char *command = count > 1 ? arguments[1] : "";
    int i;
    if (!strcmp(command, "pipe")) return (int)racdeploy_unpack_descriptor(0, 1);
    if (!strcmp(command, "misuse")) return misuse();
    if (strcmp(command, "unpack")) return 100;
    for (i = 2; i + 1 < count; i += 2) unpack(arguments[i], arguments[i + 1]);
    return 0;
}
