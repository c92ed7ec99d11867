// The emulated device in the place of cuda/backend/machine.h.
#pragma once

#include "emulation.h"
