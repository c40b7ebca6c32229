"""What the scripts here and in dev/ share: errors of one line, output that never fails on a name, and finding files."""
import argparse, contextlib, glob, os, shlex, stat, sys


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
            print("error: " + " ".join(str(message).splitlines()), file=sys.stderr)
        with contextlib.suppress(OSError):
            sys.stdout.flush()
        os._exit(1) # at an ordinary exit Python would write what is left to a pipe that is closed, and complain

    standard_files()
    try:
        try:
            main()
        except SystemExit: # of --help
            sys.stdout.flush()
            raise
        sys.stdout.flush()
    except Failure as e:
        say(e)
    except ImportError as e:
        say(f"{e}: pip install -r {needs}/requirements.txt")
    except BrokenPipeError:
        say("nobody reads what this prints any more")
    except OSError as e:
        say(f"output: {e.strerror or e}" if e.filename is None else f"{e.filename or repr('')}: {e.strerror}")
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


@contextlib.contextmanager
def naming(path):
    """Reading and writing fail without a name; here the message names the file."""
    try:
        yield
    except OSError as e:
        if e.filename is not None or isinstance(e, BrokenPipeError): # of another file, or of what is printed
            raise
        raise Failure(f"{path}: {e.strerror or e}") from None


def regular(path):
    """The path, if it is a regular file. Others are refused by name: opening a FIFO would wait for its writer."""
    mode = os.stat(path).st_mode
    if stat.S_ISDIR(mode):
        raise Failure(f"{path}: a folder, expected a file")
    if not stat.S_ISREG(mode):
        raise Failure(f"{path}: not a regular file")
    return path


def contents_of(path):
    with naming(path), open(regular(path), "rb") as f:
        return f.read()


def text_bytes(path):
    """The contents of a text. Dies if it is UTF-16 or UTF-32, which begins with U+FEFF or is full of zero bytes."""
    data = contents_of(path)
    head, name = data[:400], None
    if head[:4] in (b"\xff\xfe\0\0", b"\0\0\xfe\xff"):
        name = "UTF-32"
    elif head[:2] in (b"\xff\xfe", b"\xfe\xff"):
        name = "UTF-16"
    elif head.count(0) > 0.3 * len(head): # the order of bytes is not said, so iconv has to be told
        name = "UTF-32" if head.count(0) > 0.6 * len(head) else "UTF-16"
        name += "BE" if head[::2].count(0) > head[1::2].count(0) else "LE"
    if name:
        raise Failure(f"{path}: this text is {name}, expected UTF-8: "
                      f"iconv -f {name} -t UTF-8 {shlex.quote(path)} > NEW.txt converts it")
    return data


def identity(path):
    """The same for all names of a file or folder."""
    found = os.stat(path)
    return found.st_dev, found.st_ino


def texts_below(folder):
    """The paths of all *.txt files below a folder. A folder that symbolic links lead to twice is read once."""
    def fail(error): # else a folder that cannot be read would be left out
        raise error

    seen = set()
    for place, folders, files in os.walk(folder, followlinks=True, onerror=fail):
        if identity(place) in seen:
            folders[:] = []
            continue
        seen.add(identity(place))
        folders.sort() # so that of a folder's names the same one is taken everywhere
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
        elif "**" in name: # Python's glob would follow loops of links
            raise Failure(f"{name}: ** is not known; name the folder for all texts at any depth")
        else:
            found = sorted(path for path in glob.glob(name) if not os.path.isdir(path))
        if not found:
            os.stat(name) # raises what is wrong with a name that is no folder's
            raise Failure(f"{name}: no .txt files in this folder")
        for path in found:
            paths.setdefault(identity(path), regular(path))
    return list(paths.values())
