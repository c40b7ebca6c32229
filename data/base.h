/*
What the files of this project share: the way to report an error, memory, the opening of files, and short texts.

Files are read as this machine stores its numbers: little-endian, and with sizes of 64 bits.
*/
#ifndef MEGALODON_BASE_H
#define MEGALODON_BASE_H
#if __SIZEOF_POINTER__ != 8 || __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "megalodon.c needs a 64-bit little-endian machine: its files hold little-endian numbers and may exceed 4 GB"
#endif
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

// A program may set this hook. die() calls it with false before it prints its message, and with true afterwards. A
// program of several processes uses it to let one of them speak for all, and to end the others.
void (*on_die)(bool said);

// Replaces control characters by question marks. Messages contain names from files of strangers, which must not break a
// line or steer a terminal.
void text_clean(char* text) {
    for (; *text; text++) { *text = (unsigned char)*text < 0x20 || *text == 0x7f ? '?' : *text; }
}

// Ends the program with exit status 1. The message, printf's format and arguments, is printed to stderr as one line
// "error: ...". It should name the file, flag or tensor, and say what was expected.
__attribute__((noreturn, format(printf, 1, 2))) void die(const char* format, ...) {
    char message[4 * PATH_MAX];
    va_list args;
    fflush(NULL);
    if (on_die) { on_die(false); }
    va_start(args, format);
    vsnprintf(message, sizeof(message), format, args);
    va_end(args);
    text_clean(message);
    fprintf(stderr, "error: %s\n", message);
    if (on_die) { on_die(true); }
    _exit(1); // not exit(): its handlers would free what other threads still use
}

// Returns memory for n elements of `size` bytes, all zero; free() gives it back. It is aligned to cache lines. Large
// memory is aligned to huge pages, which cost fewer page faults and address translations. Dies if there is not enough.
void* xcalloc(size_t n, size_t size) {
    enum { CACHE_LINE = 64, HUGE_PAGE = 1 << 21 };
    void* p = NULL;
    bool fits = !size || n <= SIZE_MAX / 2 / size;
    if (!fits || posix_memalign(&p, n * size < HUGE_PAGE ? CACHE_LINE : HUGE_PAGE, n * size + 1)) {
        die("out of memory: %.1f MB asked for", 1e-6 * n * size);
    }
#ifdef MADV_HUGEPAGE
    if (n * size >= HUGE_PAGE) { madvise(p, n * size, MADV_HUGEPAGE); }
#endif
    return memset(p, 0, n * size);
}

// Makes room for one more element in a list of `count` elements of `size` bytes. Returns the list, which may move.
// The room doubles whenever count is a power of two, so nobody needs to store it. A list starts as NULL with count 0.
void* list_grow(void* list, size_t count, size_t size) {
    if (count & (count - 1)) { return list; }
    size_t bytes = (count ? 2 * count : 1) * size;
    list = realloc(list, bytes);
    if (!list) { die("out of memory: a list of %.1f MB asked for", 1e-6 * bytes); }
    return list;
}

// Opens a regular file to read and stores its size in bytes. Returns the file descriptor, or -1 and in *error the
// reason. Everything else is refused without waiting: a plain open() of a FIFO would wait for somebody to write to it.
int file_open(const char* path, size_t* size, const char** error) {
    struct stat info;
    int fd = open(path, O_RDONLY | O_NONBLOCK);
    *error = fd < 0 || fstat(fd, &info) ? strerror(errno)
           : S_ISDIR(info.st_mode) ? "not a regular file but a folder: name the files in it"
           : S_ISREG(info.st_mode) ? NULL : "not a regular file";
    if (!*error) { *size = info.st_size; return fd; }
    if (fd >= 0) { close(fd); }
    return -1;
}

// Prints into one of 32 buffers, which are used in turn, and returns it. The text is valid until the 32nd call after
// this one. What exceeds a path by more than 63 bytes is cut off.
__attribute__((format(printf, 1, 2))) char* text_of(const char* format, ...) {
    static char buffers[32][PATH_MAX + 64];
    static unsigned turn;
    va_list args;
    va_start(args, format);
    char* text = buffers[turn++ % 32];
    vsnprintf(text, sizeof(buffers[0]), format, args);
    va_end(args);
    return text;
}

// Returns a copy of a text that stays until the program ends.
char* text_keep(const char* text) {
    static char** kept;
    static size_t count;
    kept = (char**)list_grow(kept, count, sizeof(char*));
    kept[count] = strdup(text);
    if (!kept[count]) { die("out of memory: a name of %zu bytes", strlen(text)); }
    return kept[count++];
}

size_t min_size(size_t a, size_t b) { return a < b ? a : b; }
int min_int(int a, int b) { return a < b ? a : b; }

#endif
