"""What the scripts here and in dev/ share: errors of one line, output that never fails on a name, and finding files."""
import argparse, contextlib, glob, os, stat, sys

HERE = os.path.dirname(os.path.abspath(__file__))


class Failure(Exception):
    """A message for the user; see main_of."""


def standard_files():
    """Opens closed standard files on /dev/null, so that no other file gets their numbers and what is printed. Names of
    files may hold bytes that are no characters, or characters that the locale lacks: these are printed as escapes."""
    for fd, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(fd)
        except OSError:
            os.open(os.devnull, os.O_RDWR) # takes the lowest free number
            setattr(sys, name, open(fd, "w" if fd else "r", closefd=False))
    for stream in sys.stdout, sys.stderr:
        stream.reconfigure(errors="backslashreplace")


def main_of(main, needs="data"):
    """Runs a script's main(). What the user can mend ends it with one line "error: ..." and exit status 1. `needs` is
    the folder whose requirements.txt lists what the script imports."""
    def say(message):
        with contextlib.suppress(OSError):
            print("error: " + " ".join(str(message).split("\n")), file=sys.stderr)
        with contextlib.suppress(OSError):
            sys.stdout.flush()
        os._exit(1) # at an ordinary exit Python would write what is left to a pipe that is closed, and complain

    standard_files()
    try:
        main()
        sys.stdout.flush()
    except Failure as e:
        say(e)
    except ImportError as e:
        say(f"{e}: pip install -r {needs}/requirements.txt")
    except BrokenPipeError:
        say("nobody reads what this prints any more")
    except OSError as e:
        say(f"{e.filename}: {e.strerror}" if e.filename else f"output: {e.strerror or e}")
    except MemoryError:
        say("out of memory")
    except KeyboardInterrupt:
        say("interrupted; the same command goes on")


class Parser(argparse.ArgumentParser):
    """A parser of flags whose errors are one line."""

    def __init__(self, description=None, **more):
        super().__init__(description=description, allow_abbrev=False,
                         formatter_class=argparse.RawDescriptionHelpFormatter, **more)

    def error(self, message):
        raise Failure(message)


def regular(path):
    """The path, if it is a regular file. Others are refused by name: opening a FIFO would wait for its writer."""
    mode = os.stat(path).st_mode
    if stat.S_ISDIR(mode):
        raise Failure(f"{path}: a folder, expected a file")
    if not stat.S_ISREG(mode):
        raise Failure(f"{path}: not a regular file")
    return path


def text_bytes(path):
    """The contents of a text. Dies if it is UTF-16 or UTF-32, which begins with U+FEFF or is full of zero bytes."""
    with open(regular(path), "rb") as f:
        data = f.read()
    wide = data[:4] in (b"\xff\xfe\0\0", b"\0\0\xfe\xff") or data[:400].count(0) > len(data[:400]) * 0.6
    if wide or data[:2] in (b"\xff\xfe", b"\xfe\xff") or data[:400].count(0) > len(data[:400]) * 0.3:
        name = "UTF-32" if wide else "UTF-16"
        raise Failure(f"{path}: this text is {name}, expected UTF-8: iconv -f {name} -t UTF-8 converts it")
    return data


def texts_below(folder):
    """The paths of all *.txt files below a folder. A folder that symbolic links lead to twice is read once."""
    seen = set()
    for place, folders, files in os.walk(folder, followlinks=True):
        real = os.path.realpath(place)
        if real in seen:
            folders[:] = []
            continue
        seen.add(real)
        yield from (os.path.join(place, name) for name in files if name.endswith(".txt"))


def texts_in(names):
    """The paths that files, patterns, or folders (all *.txt below them) name, sorted within each name. A name that
    exists is no pattern. A file that several names lead to counts once."""
    paths = {}
    for name in names:
        if os.path.isdir(name):
            found = sorted(texts_below(name))
        elif os.path.lexists(name):
            found = [name]
        else:
            found = sorted(path for path in glob.glob(name, recursive=True) if not os.path.isdir(path))
        if not found:
            raise Failure(f"{name}: " + ("no .txt files in this folder" if os.path.isdir(name) else "no such file"))
        for path in found:
            paths.setdefault(os.path.realpath(path), regular(path))
    return list(paths.values())
