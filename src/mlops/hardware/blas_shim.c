/* BLAS and LAPACK under their usual names, answered by scipy-openblas32, whose names carry a prefix.
 *
 * `blas.py` defines OPENBLAS (the path of that library) above this text and compiles it once. The
 * library is opened apart from the process's global names, so a SciPy in the same process keeps the
 * OpenBLAS of its own. Each symbol is one jump, whatever the arguments are.
 */
#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>

static void missing(void)
{
    fputs("mlops: " OPENBLAS " is gone or too old; run `mlops doctor`.\n", stderr);
    abort();
}

#if defined(__x86_64__)
#define JUMP(name) "jmp *to_" #name "(%rip)\n"
#elif defined(__aarch64__)
#define JUMP(name) \
    "adrp x16, to_" #name "\n ldr x16, [x16, :lo12:to_" #name "]\n br x16\n"
#else
#error "no jump is written for this machine"
#endif

#define SYMBOLS(X) \
    X(cblas_sgemm) X(cblas_dgemm) X(cblas_cgemm) \
    X(sgeev_) X(dgeev_) X(cgeev_) X(sgesdd_) X(dgesdd_) X(cgesdd_) \
    X(ssyevd_) X(dsyevd_) X(cheevd_) X(sgeqrf_) X(dgeqrf_) X(sorgqr_) X(dorgqr_) \
    X(sgetrf_) X(dgetrf_) X(sgetri_) X(dgetri_) X(spotrf_) X(dpotrf_) X(strtri_) X(dtrtri_)

#define DEFINE(name) \
    static void *to_##name __attribute__((used)) = (void *)missing; \
    __asm__(".text\n.globl " #name "\n.type " #name ", %function\n" #name ":\n" JUMP(name) \
            ".size " #name ", .-" #name "\n.previous\n");
SYMBOLS(DEFINE)

#define BIND(name) \
    if ((found = dlsym(openblas, "scipy_" #name))) \
        to_##name = found;

__attribute__((constructor)) static void bind(void)
{
    void *openblas = dlopen(OPENBLAS, RTLD_NOW | RTLD_LOCAL), *found;
    if (openblas) {
        SYMBOLS(BIND)
    }
}
