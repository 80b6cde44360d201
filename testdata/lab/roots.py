"""A Debian root with databases and runtimes from Debian's packages, as a guest's first disk: each of
its programs holds data that it knows, and is asked for it after a restore."""

import shutil
from pathlib import Path

from debian import Root
from file_systems import fill
from host import LAB, run

PACKAGES = ["redis-server", "postgresql-15", "openjdk-17-jre-headless", "python3-minimal"]
# To compile with, and gone again before the image is made.
COMPILER = "openjdk-17-jdk-headless"
IMAGE_MIB = 1536

START = """#!/bin/sh
# Starts what holds memory; /run/ready is there once all of it does.
set -e
export PATH=/usr/sbin:/usr/bin:/sbin:/bin HOME=/root LC_ALL=C
redis-server --port 0 --unixsocket /run/redis.sock --save '' --dir /tmp --daemonize yes \\
    --logfile /run/redis.log
setpriv --reuid=postgres --regid=postgres --clear-groups /usr/lib/postgresql/15/bin/postgres \\
    -D /var/lib/postgresql/lab > /run/postgres.log 2>&1 &
python3 /lab/numbers.py > /run/python.log 2>&1 &
java -Xmx96m -XX:TieredStopAtLevel=1 -cp /lab Numbers > /run/java.log 2>&1 &
until redis-cli -s /run/redis.sock ping > /run/redis.ping 2>&1; do sleep 1; done
redis-cli -s /run/redis.sock eval "for i = 1, 40000 do
    redis.call('set', 'key:' .. i, string.rep(redis.sha1hex(i), 8)) end" 0 > /run/redis.filled
redis-cli -s /run/redis.sock eval "$(cat /lab/sum.lua)" 0 > /run/redis.sum
until sh /lab/sum.sh > /run/postgres.sum 2> /run/postgres.err; do sleep 1; done
until [ -s /run/python.beat ] && [ -s /run/java.beat ]; do sleep 1; done
if grep -q lab.storm=1 /proc/cmdline; then sh /lab/storm.sh & fi
touch /run/ready
"""

# Past the page cache and through it, until the guest is gone.
STORM = """while :; do
    dd if=/dev/urandom of=/var/storm bs=64k count=64 seek=$((round % 8 * 64)) oflag=direct \\
        conv=notrunc
    dd if=/dev/urandom of=/var/storm.cached bs=64k count=16 conv=notrunc,fsync
    round=$((round + 1))
done > /dev/null 2>&1
"""

CHECK = """#!/bin/sh
# Whether all of it is as it was, and runs.
export PATH=/usr/sbin:/usr/bin:/sbin:/bin HOME=/root LC_ALL=C
bad() { echo "LAB-APP $*"; exit 1; }
[ ! -e /run/python.bad ] || bad python: "$(cat /run/python.bad)"
[ ! -e /run/java.bad ] || bad java: "$(cat /run/java.bad)"
python=$(cat /run/python.beat) java=$(cat /run/java.beat)
[ "$(redis-cli -s /run/redis.sock eval "$(cat /lab/sum.lua)" 0)" = "$(cat /run/redis.sum)" ] ||
    bad redis
[ "$(sh /lab/sum.sh)" = "$(cat /run/postgres.sum)" ] || bad postgres
for left in $(seq 60 -1 0); do
    [ "$(cat /run/python.beat)" != "$python" ] && [ "$(cat /run/java.beat)" != "$java" ] && break
    [ "$left" != 0 ] || bad "python or java does not run on"
    sleep 1
done
[ ! -e /run/python.bad ] && [ ! -e /run/java.bad ] || bad "python or java found other data"
"""

SUM_LUA = """local sum = ''
for i = 1, 40000 do
    sum = redis.sha1hex(sum .. redis.call('get', 'key:' .. i))
end
return sum
"""

SUM_SH = """exec setpriv --reuid=postgres --regid=postgres --clear-groups psql -h /tmp -d postgres -At \\
    -c 'select count(*), sum(hashtext(words)::bigint) from lab'
"""

# Of a database that is read from its files and stays in its buffers.
TABLE = """create table lab as
    select n, repeat(md5(n::text), 4) as words from generate_series(1, 100000) as n;
create index on lab (n);
checkpoint;
"""

PYTHON = """import hashlib, os, time

held = {n: hashlib.sha256(str(n).encode()).hexdigest() for n in range(60000)}


def total():
    found = hashlib.sha256()
    for n in range(60000):
        found.update(held[n].encode())
    return found.hexdigest()


def put(name, text):
    with open("/run/python.new", "w") as file:
        file.write(text)
    os.rename("/run/python.new", "/run/python." + name)


first, beat = total(), 0
while True:
    now = total()
    if now != first:
        put("bad", now)
    beat += 1
    put("beat", str(beat))
    time.sleep(1)
"""

JAVA = """import java.nio.file.*;
import java.util.*;

public class Numbers {
    static Map<Integer, long[]> held = new HashMap<>();

    static long total() {
        long sum = 0;
        for (int n = 0; n < 20000; n++)
            for (long value : held.get(n))
                sum = sum * 31 + value;
        return sum;
    }

    static void put(String name, String text) throws Exception {
        Path file = Path.of("/run/java.new");
        Files.writeString(file, text);
        Files.move(file, Path.of("/run/java." + name), StandardCopyOption.REPLACE_EXISTING);
    }

    public static void main(String[] none) throws Exception {
        Random random = new Random(1);
        for (int n = 0; n < 20000; n++)
            held.put(n, random.longs(200).toArray());
        long first = total();
        for (long beat = 1;; beat++) {
            if (total() != first)
                put("bad", "another sum");
            put("beat", Long.toString(beat));
            Thread.sleep(1000);
        }
    }
}
"""


def tree() -> Path:
    """The root as a folder."""
    root = Root("apps", "bookworm", PACKAGES)
    done = root.folder / "lab" / "done"
    if done.exists():
        return root.folder
    root.install()
    shutil.rmtree(root.folder / "lab", ignore_errors=True)
    for name, text in {"start": START, "check": CHECK, "sum.lua": SUM_LUA, "sum.sh": SUM_SH,
                       "storm.sh": STORM, "numbers.py": PYTHON, "Numbers.java": JAVA,
                       "table.sql": TABLE}.items():
        file = root.folder / "lab" / name
        file.parent.mkdir(exist_ok=True)
        file.write_text(text)
        file.chmod(0o755)
    root.inside("apt-get", "install", "-y", "--no-install-recommends", COMPILER)
    root.inside("javac", "-d", "/lab", "/lab/Numbers.java")
    root.inside("apt-get", "purge", "-y", COMPILER)
    root.inside("apt-get", "clean")
    binaries = "/usr/lib/postgresql/15/bin"
    postgres = ("setpriv", "--reuid=postgres", "--regid=postgres", "--clear-groups")
    data = "/var/lib/postgresql/lab"
    root.inside("rm", "-rf", data)
    root.inside(*postgres, f"{binaries}/initdb", "-D", data)
    with open(root.folder / data.lstrip("/") / "postgresql.conf", "a") as settings:
        settings.write("listen_addresses = ''\nunix_socket_directories = '/tmp'\n"
                       "shared_buffers = 48MB\nautovacuum = off\n")
    root.inside(*postgres, f"{binaries}/pg_ctl", "-D", data, "-w", "-l", "/tmp/made.log", "start")
    try:
        root.inside(*postgres, "psql", "-h", "/tmp", "-d", "postgres", "-f", "/lab/table.sql")
    finally:
        root.inside(*postgres, f"{binaries}/pg_ctl", "-D", data, "-w", "-m", "fast", "stop")
    done.touch()
    return root.folder


def build_apps(file_system: str) -> Path:
    """The root as an image."""
    image = LAB / f"apps.{file_system}"
    if image.exists():
        return image
    part = image.with_suffix(f".{file_system}.part")
    if file_system == "ext4":
        run("mkfs.ext4", "-q", "-F", "-d", tree(), part, f"{IMAGE_MIB}M")
    else:
        fill(file_system, tree(), part, IMAGE_MIB)
    part.rename(image)
    return image
