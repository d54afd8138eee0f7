#include <racdeploy.h>

static_assert(sizeof(racdeploy_thresholds) == 6 * sizeof(double));
