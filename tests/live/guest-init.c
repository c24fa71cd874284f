/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* The only program of the guest in the tests: its init. It mounts the file system on /dev/vda,
 * keeps writing to it, and tells on the console what is durable:
 *
 *     ready                 the file system is mounted, the work begins
 *     file N SIZE CRC       file number N was written and synced
 *     gone N                file number N is about to be removed
 *     block N VERSION       block N of "db" was overwritten in place and synced
 *     bad WHAT              something does not read as it was written: the guest stops
 *     end                   it was told to end ('q' on the console), and has unmounted
 *
 * Checks read past the guest's page cache. A block of "db" carries its number, its version and a
 * checksum, so that a test that reads a copy of the disk can tell which version it has found.
 *
 * With mode=boot in its environment it hands over to /sbin/init of the file system, which is this
 * program again: a machine that was booted from the disk.
 *
 * With mode=volume the file system is on a volume of LVM, in stripes over /dev/vda and /dev/vdb,
 * and with mode=new-volume it makes that first. */
#include <fcntl.h>
#include <poll.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/reboot.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#define FILES      128 /* that are kept */
#define FILE_MOST  (128 << 10)
#define BLOCK      4096
#define BLOCKS     1024 /* of "db" */
#define BLOCK_HEAD 24   /* number, version, checksum of the rest */

static uint64_t state = 1;                 /* of random numbers */
static uint32_t sums[FILES], sizes[FILES]; /* of the files that are kept */
static uint64_t versions[BLOCKS];          /* of the blocks; 0: not written yet */
static _Alignas(BLOCK) unsigned char data[FILE_MOST];

/* ------------------------------------------------------------------ small things */

static void die(const char *what, long number)
{
    printf("bad %s %ld: %m\n", what, number);
    reboot(RB_POWER_OFF);
    for (;;)
        pause();
}

static uint64_t random_number(void)
{
    state ^= state << 13;
    state ^= state >> 7;
    state ^= state << 17;
    return state;
}

static void fill(unsigned char *to, size_t n)
{
    for (size_t i = 0; i < n; i += 8) {
        uint64_t r = random_number();
        memcpy(to + i, &r, 8);
    }
}

/* As zlib's crc32(). */
static uint32_t checksum(const unsigned char *from, size_t n)
{
    static uint32_t table[256];
    if (!table[1])
        for (uint32_t i = 0; i < 256; i++) {
            table[i] = i;
            for (int bit = 0; bit < 8; bit++)
                table[i] = table[i] >> 1 ^ (table[i] & 1 ? 0xedb88320 : 0);
        }
    uint32_t sum = ~0U;
    for (size_t i = 0; i < n; i++)
        sum = sum >> 8 ^ table[(sum ^ from[i]) & 0xff];
    return ~sum;
}

static int open_file(const char *dir, const char *name, int flags)
{
    char path[64];
    snprintf(path, sizeof(path), "%s/%s", dir, name);
    return open(path, flags | O_CLOEXEC, 0644);
}

static int open_number(const char *dir, uint64_t number, int flags)
{
    char name[32];
    snprintf(name, sizeof(name), "f%llu", (unsigned long long)number);
    return open_file(dir, name, flags);
}

/* ------------------------------------------------------------------ the work */

/* A file of a random length, with a range of zeros in it now and then. */
static void write_file(const char *dir, uint64_t number)
{
    size_t n = 1 + random_number() % FILE_MOST;
    fill(data, FILE_MOST);
    if (random_number() % 4 == 0)
        memset(data + n / 4, 0, n / 2);
    int fd = open_number(dir, number, O_WRONLY | O_CREAT | O_TRUNC);
    if (fd < 0 || write(fd, data, n) != (ssize_t)n || fsync(fd) < 0)
        die("write of file", (long)number);
    close(fd);
    sums[number % FILES] = checksum(data, n);
    sizes[number % FILES] = (uint32_t)n;
    printf("file %llu %zu %u\n", (unsigned long long)number, n, sums[number % FILES]);
}

static void remove_file(const char *dir, uint64_t number)
{
    char path[64];
    snprintf(path, sizeof(path), "%s/f%llu", dir, (unsigned long long)number);
    printf("gone %llu\n", (unsigned long long)number);
    if (unlink(path) < 0)
        die("removal of file", (long)number);
}

static void check_file(const char *dir, uint64_t number)
{
    int fd = open_number(dir, number, O_RDONLY | O_DIRECT);
    ssize_t n = fd < 0 ? -1 : read(fd, data, sizeof(data));
    if (n != (ssize_t)sizes[number % FILES] || checksum(data, (size_t)n) != sums[number % FILES])
        die("file", (long)number);
    close(fd);
}

static void write_block(int db, uint64_t version)
{
    uint64_t number = random_number() % BLOCKS;
    fill(data + BLOCK_HEAD, BLOCK - BLOCK_HEAD);
    uint64_t head[] = {number, version, checksum(data + BLOCK_HEAD, BLOCK - BLOCK_HEAD)};
    memcpy(data, head, BLOCK_HEAD);
    if (pwrite(db, data, BLOCK, (off_t)number * BLOCK) != BLOCK || fdatasync(db) < 0)
        die("write of block", (long)number);
    versions[number] = version;
    printf("block %llu %llu\n", (unsigned long long)number, (unsigned long long)version);
}

static void check_block(int db, uint64_t number)
{
    uint64_t head[3];
    if (pread(db, data, BLOCK, (off_t)number * BLOCK) != BLOCK)
        die("read of block", (long)number);
    memcpy(head, data, BLOCK_HEAD);
    if (versions[number] == 0)
        return;
    if (head[0] != number || head[1] != versions[number] ||
        head[2] != checksum(data + BLOCK_HEAD, BLOCK - BLOCK_HEAD))
        die("block", (long)number);
}

static bool told_to_end(void)
{
    struct pollfd input = {.fd = STDIN_FILENO, .events = POLLIN};
    char c;
    while (poll(&input, 1, 0) > 0 && read(STDIN_FILENO, &c, 1) == 1)
        if (c == 'q')
            return true;
    return false;
}

static void work(const char *dir)
{
    int db = open_file(dir, "db", O_RDWR | O_CREAT | O_DIRECT);
    if (db < 0 || ftruncate(db, BLOCKS * BLOCK) < 0 || fsync(db) < 0)
        die("open of db", 0);
    printf("ready\n");
    uint64_t version = 0;
    for (uint64_t n = 0; !told_to_end(); n++) {
        if (n >= FILES)
            remove_file(dir, n - FILES);
        write_file(dir, n);
        for (int i = 0; i < 4; i++)
            write_block(db, ++version);
        check_file(dir, n < FILES ? random_number() % (n + 1) : n - random_number() % FILES);
        check_block(db, random_number() % BLOCKS);
    }
    close(db);
}

/* ------------------------------------------------------------------ the machine */

/* Names are in the order in which they need each other: 00.ko, 01.ko, ... */
static void load_modules(void)
{
    for (int i = 0;; i++) {
        char path[32];
        snprintf(path, sizeof(path), "/modules/%02d.ko", i);
        int fd = open(path, O_RDONLY | O_CLOEXEC);
        if (fd < 0)
            return;
        if (syscall(SYS_finit_module, fd, "", 0) < 0)
            die("module", i);
        close(fd);
    }
}

/* Without udev, which would make the device nodes. */
#define LVM_CONFIG                                                                            \
    "activation { udev_sync=0 udev_rules=0 } devices { external_device_info_source=\"none\" " \
    "obtain_device_list_from_udev=0 use_devicesfile=0 } backup { backup=0 archive=0 } "       \
    "global { event_activation=0 } log { level=0 }"

static void run(char *const *argv)
{
    int status = -1;
    pid_t child = fork();
    if (child == 0) {
        execv(argv[0], argv);
        _exit(127);
    }
    if (child < 0 || waitpid(child, &status, 0) < 0 || status != 0)
        die(argv[1], status);
}

#define RUN(...) run((char *[]){__VA_ARGS__, NULL})
#define LVM(command, ...) \
    RUN("/sbin/lvm", command, "-qq", "--yes", "--config", LVM_CONFIG, __VA_ARGS__)

/* Stripes of 4 KiB, so that nearly all that the file system does needs both disks. */
static void open_volume(bool fresh)
{
    mount("proc", "/proc", "proc", 0, NULL);
    mount("sys", "/sys", "sysfs", 0, NULL);
    if (fresh) {
        LVM("pvcreate", "/dev/vda", "/dev/vdb");
        LVM("vgcreate", "-s", "1m", "vg", "/dev/vda", "/dev/vdb");
        LVM("lvcreate", "-i", "2", "-I", "4k", "-Wn", "-Zn", "-l", "100%FREE", "-n", "lv", "vg");
        RUN("/sbin/mke2fs", "-q", "-t", "ext4", "/dev/vg/lv");
    } else {
        LVM("vgck", "vg");
        LVM("vgchange", "-ay", "vg");
    }
}

static void boot_from_disk(void)
{
    char *argv[] = {"/sbin/init", NULL};
    if (chdir("/mnt") < 0 || mount(".", "/", NULL, MS_MOVE, NULL) < 0 || chroot(".") < 0)
        die("change of root", 0);
    execv(argv[0], argv);
    die("/sbin/init", 0);
}

int main(int argc, char **argv)
{
    const char *mode = getenv("mode"), *seed = getenv("seed");
    bool from_disk = argc > 0 && strcmp(argv[0], "/sbin/init") == 0;
    setvbuf(stdout, NULL, _IOLBF, 0);
    if (seed)
        state = strtoull(seed, NULL, 10) | 1;
    if (!from_disk) {
        bool fresh = mode && strcmp(mode, "new-volume") == 0;
        bool volume = fresh || (mode && strcmp(mode, "volume") == 0);
        mount("dev", "/dev", "devtmpfs", 0, NULL);
        load_modules();
        if (volume)
            open_volume(fresh);
        if (mount(volume ? "/dev/vg/lv" : "/dev/vda", "/mnt", "ext4", 0, "discard") < 0)
            die("mount", 0);
        if (mode && strcmp(mode, "boot") == 0)
            boot_from_disk();
    }
    work(from_disk ? "" : "/mnt");
    sync();
    if (from_disk ? mount(NULL, "/", NULL, MS_REMOUNT | MS_RDONLY, NULL) : umount("/mnt"))
        die("unmount", 0);
    printf("end\n");
    fflush(stdout);
    reboot(RB_POWER_OFF);
    return 0;
}
