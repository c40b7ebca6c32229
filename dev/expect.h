// What the tests of the headers in data/ share: groups of expectations, and calls that must end with an error.
#ifndef MEGALODON_EXPECT_H
#define MEGALODON_EXPECT_H
#include "../data/base.h"
#include <sys/wait.h>

static char folder[] = "/tmp/megalodon-test-XXXXXX"; // made by main with mkdtemp
static bool group_good = true;
static int groups_passed, groups_failed;
static int message; // a child's stderr, read by refused()

static void expect(bool good, const char* what) {
    if (!good) { printf("wrong: %s\n", what); }
    group_good = group_good && good;
}

static void group(const char* name) { // ends a group of expectations
    if (!group_good || getenv("VERBOSE")) { printf("%s %s\n", group_good ? "ok" : "FAILED", name); }
    groups_passed += group_good; groups_failed += !group_good;
    group_good = true;
}

static int summary(const char* name) { // of a test program, at its end; returns the exit status
    printf("%-6s %s: %d passed, %d failed\n", groups_failed ? "FAILED" : "ok", name, groups_passed, groups_failed);
    return groups_failed > 0;
}

// if (child()) { CALL; _exit(0); } refused("..."): CALL must die, with a message of one line that contains this text.
static bool child(void) {
    int ends[2];
    fflush(NULL);
    if (pipe(ends)) { abort(); }
    pid_t pid = fork();
    if (pid == 0) { dup2(ends[1], STDERR_FILENO); }
    close(ends[1]);
    message = ends[0];
    return pid == 0;
}
static void refused(const char* text) {
    char said[4096];
    size_t n = 0;
    int status;
    for (ssize_t got; (got = read(message, said + n, sizeof(said) - 1 - n)) > 0; n += got) {}
    said[n] = 0;
    close(message);
    wait(&status);
    bool one_line = n > 0 && strchr(said, '\n') == said + n - 1 && !strncmp(said, "error: ", 7);
    bool good = WIFEXITED(status) && WEXITSTATUS(status) == 1 && one_line && strstr(said, text);
    expect(good, text_of("expected \"%s\", got: %s", text, said));
}

#endif
