// What the kernels ask of the machine: threads, warps, barriers, asynchronous copies and tensor cores. Everything else
// under cuda/kernels is plain C++, so that the host can run it too. The build says which machine.h is found:
// cuda/backend has the device's, tests/cuda_host an emulated one with the same functions.
//
// Note: [Fragments]
// A warp holds a matrix in fragments, a few elements a lane; with g = lane / 4 and t = lane % 4 (PTX ISA, "Matrix
// fragments for mma.m16n8k16" and "mma.m16n8k8"):
//   a, 16 x k of 16-bit elements, k = 16:  a0 = (g, 2t..2t+1)   a1 = (g+8, 2t..)   a2 = (g, 2t+8..)   a3 = (g+8,
//   2t+8..) b, k x 8:                              b0 = (2t..2t+1, g)   b1 = (2t+8.., g) a, 16 x k of tf32 elements, k
//   = 8:     a0 = (g, t)          a1 = (g+8, t)      a2 = (g, t+4)      a3 = (g+8, t+4) b, k x 8: b0 = (t, g) b1 =
//   (t+4, g) c, 16 x 8 of float32:                  c0, c1 = (g, 2t..2t+1)                  c2, c3 = (g+8, 2t..2t+1)
// One step along k is 32 bytes of a row for either kind, and ldmatrix, which deals out 16-byte rows as 32-bit words,
// loads a and (from rows of b's columns) b for both.
#pragma once

#include "machine.h"
