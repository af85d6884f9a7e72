// For `make wheels`: included before every source, so that a wheel built on a newer Linux asks for nothing newer than
// manylinux_2_28 has. In a manylinux container none of it is needed.
#if defined(__linux__) && defined(__x86_64__)
__asm__(".symver exp,exp@GLIBC_2.2.5");
__asm__(".symver pow,pow@GLIBC_2.2.5");
#elif defined(__linux__) && defined(__aarch64__)
__asm__(".symver exp,exp@GLIBC_2.17");
__asm__(".symver pow,pow@GLIBC_2.17");
#endif
#if defined(__linux__)
#include <new>
// std::vector of GCC 11 and later calls it, for sizes that overflow; libstdc++ has it from then on.
extern "C" __attribute__((weak, noreturn, visibility("hidden"))) void _ZSt28__throw_bad_array_new_lengthv() {
    throw std::bad_array_new_length();
}
#endif
