#include <racdeploy.h>

static_assert(sizeof(racdeploy_thresholds) == 8 * sizeof(double));
