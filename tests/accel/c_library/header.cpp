#include <racdeploy.h>

#include <cstddef>

// An initializer of five shares, as the first version had them, still means what it meant.
static_assert(offsetof(racdeploy_thresholds, q8_0) == 0);
static_assert(offsetof(racdeploy_thresholds, q8_0_two_of_four) == 1 * sizeof(double));
static_assert(offsetof(racdeploy_thresholds, q4_0) == 2 * sizeof(double));
static_assert(offsetof(racdeploy_thresholds, f16) == 3 * sizeof(double));
static_assert(offsetof(racdeploy_thresholds, bf16) == 4 * sizeof(double));
static_assert(sizeof(racdeploy_thresholds) == 8 * sizeof(double));
