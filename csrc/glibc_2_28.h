// Included before everything else where ATTNRB_MANYLINUX is on: the library then needs no symbol of a C library newer
// than glibc 2.28, whatever the machine that compiles it has. Wheels are built so (manylinux_2_28).
#pragma once

// The same functions under the first of their versions. Newer ones, of 2.29, only leave errno alone.
#if defined(__x86_64__)
#define ATTNRB_GLIBC_FIRST "GLIBC_2.2.5"
#elif defined(__aarch64__)
#define ATTNRB_GLIBC_FIRST "GLIBC_2.17"
#else
#error "ATTNRB_MANYLINUX: expected x86-64 or aarch64"
#endif
__asm__(".symver exp,exp@" ATTNRB_GLIBC_FIRST);
__asm__(".symver exp2,exp2@" ATTNRB_GLIBC_FIRST);
__asm__(".symver log,log@" ATTNRB_GLIBC_FIRST);
__asm__(".symver log2,log2@" ATTNRB_GLIBC_FIRST);
__asm__(".symver pow,pow@" ATTNRB_GLIBC_FIRST);
