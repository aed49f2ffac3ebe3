/* NAME.exe starts the Python of NAME.txt on NAME.py with its own arguments, and ends as that ends. */
#include <stdio.h>
#include <wchar.h>
#include <windows.h>

int wmain(int count, wchar_t **arguments)
{
    wchar_t own[4096], python[4096], line[32768];
    PROCESS_INFORMATION started;
    STARTUPINFOW startup = {.cb = sizeof startup};
    DWORD status;
    FILE *file;

    GetModuleFileNameW(NULL, own, 4096);
    wcscpy(wcsrchr(own, L'.'), L".txt");
    file = _wfopen(own, L"rt, ccs=UTF-8");
    if (!file || !fgetws(python, 4096, file))
        return 126;
    fclose(file);
    python[wcscspn(python, L"\r\n")] = 0;
    wcscpy(wcsrchr(own, L'.'), L".py");
    swprintf(line, 32768, L"\"%ls\" \"%ls\"", python, own);
    for (int n = 1; n < count; n++) {
        wcscat(line, L" \"");
        wcscat(line, arguments[n]);
        wcscat(line, L"\"");
    }
    if (!CreateProcessW(python, line, NULL, NULL, TRUE, 0, NULL, NULL, &startup, &started))
        return 126;
    WaitForSingleObject(started.hProcess, INFINITE);
    GetExitCodeProcess(started.hProcess, &status);
    return status;
}
