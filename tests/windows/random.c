/* What llama.cpp's build asks of bcryptprimitives.dll, which Wine lacks. */
#include <windows.h>

BOOLEAN NTAPI SystemFunction036(PVOID, ULONG);

__declspec(dllexport) BOOL WINAPI ProcessPrng(PBYTE data, SIZE_T count)
{
    return SystemFunction036(data, (ULONG)count);
}
