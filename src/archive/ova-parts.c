/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include <archive.h>
#include <archive_entry.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "archive/ova-write.h"
#include "base/bytes.h"
#include "base/cleanup.h"
#include "base/error.h"
#include "base/loaded.h"

/* ------------------------------------------------------------------ the descriptor
 *
 * Kept to what ESXi, VirtualBox and Proxmox read alike. The children of an Item stand in the order
 * of the alphabet, which the schema wants. */

#define HEAD                                                            \
    "<?xml version=\"1.0\" encoding=\"UTF-8\"?>\n"                      \
    "<Envelope xmlns=\"http://schemas.dmtf.org/ovf/envelope/1\"\n"      \
    "  xmlns:ovf=\"http://schemas.dmtf.org/ovf/envelope/1\"\n"          \
    "  xmlns:rasd=\"http://schemas.dmtf.org/wbem/wscim/1/cim-schema/2/" \
    "CIM_ResourceAllocationSettingData\"\n"                             \
    "  xmlns:vssd=\"http://schemas.dmtf.org/wbem/wscim/1/cim-schema/2/" \
    "CIM_VirtualSystemSettingData\"\n"                                  \
    "  xmlns:vmw=\"http://www.vmware.com/schema/ovf\">\n"
#define STREAM "http://www.vmware.com/interfaces/specifications/vmdk.html#streamOptimized"
#define WIDEST 19 /* digits of a size below 2^63 */

enum { CPU = 1, MEMORY, FIRST_CONTROLLER };
enum { TYPE_CPU = 3, TYPE_MEMORY, TYPE_IDE, TYPE_SCSI, TYPE_DISK = 17 };

struct bus {
    const char *name, *sub_type;
    int type;
    unsigned disks; /* a controller has */
};

static struct bus bus_of(const char *controller)
{
    if (controller && strcmp(controller, "ide") == 0)
        return (struct bus){"IDE", NULL, TYPE_IDE, 2};
    return (struct bus){"SCSI", "lsilogic", TYPE_SCSI, 15};
}

static void put_size(FILE *f, uint64_t size, bool known)
{
    if (known)
        fprintf(f, "%" PRIu64, size);
    else
        fprintf(f, "%0*d", WIDEST, 0);
}

static void put_disk(FILE *f, const struct ova_new_disk *d, size_t i, bool sizes)
{
    uint64_t unit = d->capacity % (1u << 30) == 0 ? 30 : d->capacity % (1u << 20) == 0 ? 20 : 0;
    fprintf(f, "    <Disk ovf:capacity=\"%" PRIu64 "\" ovf:capacityAllocationUnits=\"byte",
            d->capacity >> unit);
    if (unit)
        fprintf(f, " * 2^%" PRIu64, unit);
    fprintf(f,
            "\" ovf:diskId=\"vmdisk%zu\" ovf:fileRef=\"file%zu\"\n      ovf:format=\"" STREAM
            "\" ovf:populatedSize=\"",
            i + 1, i + 1);
    put_size(f, d->stored, sizes);
    fputs("\"/>\n", f);
}

static void put_hardware(FILE *f, const struct dr_ova_create_options *o)
{
    uint64_t mib = (o->memory ? o->memory : UINT64_C(1) << 30) >> 20;
    unsigned cpus = o->cpus ? o->cpus : 1;
    fprintf(f,
            "      <Item>\n"
            "        <rasd:AllocationUnits>hertz * 10^6</rasd:AllocationUnits>\n"
            "        <rasd:Description>Number of virtual processors</rasd:Description>\n"
            "        <rasd:ElementName>%u virtual CPU(s)</rasd:ElementName>\n"
            "        <rasd:InstanceID>%d</rasd:InstanceID>\n"
            "        <rasd:ResourceType>%d</rasd:ResourceType>\n"
            "        <rasd:VirtualQuantity>%u</rasd:VirtualQuantity>\n"
            "      </Item>\n"
            "      <Item>\n"
            "        <rasd:AllocationUnits>byte * 2^20</rasd:AllocationUnits>\n"
            "        <rasd:Description>Memory size</rasd:Description>\n"
            "        <rasd:ElementName>%" PRIu64 "MB of memory</rasd:ElementName>\n"
            "        <rasd:InstanceID>%d</rasd:InstanceID>\n"
            "        <rasd:ResourceType>%d</rasd:ResourceType>\n"
            "        <rasd:VirtualQuantity>%" PRIu64 "</rasd:VirtualQuantity>\n"
            "      </Item>\n",
            cpus, CPU, TYPE_CPU, cpus, mib, MEMORY, TYPE_MEMORY, mib);
}

static void put_controller(FILE *f, const struct bus *bus, unsigned i)
{
    fprintf(f,
            "      <Item>\n"
            "        <rasd:Address>%u</rasd:Address>\n"
            "        <rasd:Description>%s Controller</rasd:Description>\n"
            "        <rasd:ElementName>%s Controller %u</rasd:ElementName>\n"
            "        <rasd:InstanceID>%u</rasd:InstanceID>\n",
            i, bus->name, bus->name, i, FIRST_CONTROLLER + i);
    if (bus->sub_type)
        fprintf(f, "        <rasd:ResourceSubType>%s</rasd:ResourceSubType>\n", bus->sub_type);
    fprintf(f,
            "        <rasd:ResourceType>%d</rasd:ResourceType>\n"
            "      </Item>\n",
            bus->type);
}

static void put_drive(FILE *f, const struct bus *bus, unsigned controllers, unsigned i)
{
    unsigned at = i % bus->disks;
    if (bus->type == TYPE_SCSI && at >= 7)
        at++; /* 7 is the controller itself */
    fprintf(f,
            "      <Item>\n"
            "        <rasd:AddressOnParent>%u</rasd:AddressOnParent>\n"
            "        <rasd:ElementName>Hard Disk %u</rasd:ElementName>\n"
            "        <rasd:HostResource>ovf:/disk/vmdisk%u</rasd:HostResource>\n"
            "        <rasd:InstanceID>%u</rasd:InstanceID>\n"
            "        <rasd:Parent>%u</rasd:Parent>\n"
            "        <rasd:ResourceType>%d</rasd:ResourceType>\n"
            "      </Item>\n",
            at, i + 1, i + 1, FIRST_CONTROLLER + controllers + i, FIRST_CONTROLLER + i / bus->disks,
            TYPE_DISK);
}

static void put_system(FILE *f, const char *name, const struct dr_ova_create_options *o, unsigned n)
{
    struct bus bus = bus_of(o->controller);
    unsigned controllers = (n + bus.disks - 1) / bus.disks;
    fprintf(f,
            "  <VirtualSystem ovf:id=\"%s\">\n"
            "    <Info>A virtual machine</Info>\n"
            "    <Name>%s</Name>\n"
            "    <OperatingSystemSection ovf:id=\"102\" vmw:osType=\"otherGuest64\">\n"
            "      <Info>The kind of installed guest operating system</Info>\n"
            "      <Description>Other (64-bit)</Description>\n"
            "    </OperatingSystemSection>\n"
            "    <VirtualHardwareSection>\n"
            "      <Info>Virtual hardware requirements</Info>\n"
            "      <System>\n"
            "        <vssd:ElementName>Virtual Hardware Family</vssd:ElementName>\n"
            "        <vssd:InstanceID>0</vssd:InstanceID>\n"
            "        <vssd:VirtualSystemIdentifier>%s</vssd:VirtualSystemIdentifier>\n"
            "        <vssd:VirtualSystemType>vmx-10</vssd:VirtualSystemType>\n"
            "      </System>\n",
            name, name, name);
    put_hardware(f, o);
    for (unsigned i = 0; i < controllers; i++)
        put_controller(f, &bus, i);
    for (unsigned i = 0; i < n; i++)
        put_drive(f, &bus, controllers, i);
    fputs("    </VirtualHardwareSection>\n  </VirtualSystem>\n", f);
}

char *ova_descriptor(const char *name, const struct dr_ova_create_options *o,
                     const struct ova_new_disk *disks, size_t n, bool sizes, size_t room)
{
    char *text = NULL;
    size_t len = 0;
    FILE *f = open_memstream(&text, &len);
    if (!f)
        return NULL;
    fputs(HEAD "  <References>\n", f);
    for (size_t i = 0; i < n; i++) {
        fprintf(f, "    <File ovf:href=\"%s\" ovf:id=\"file%zu\" ovf:size=\"", disks[i].name,
                i + 1);
        put_size(f, disks[i].size, sizes);
        fputs("\"/>\n", f);
    }
    fputs("  </References>\n  <DiskSection>\n    <Info>Virtual disk information</Info>\n", f);
    for (size_t i = 0; i < n; i++)
        put_disk(f, &disks[i], i, sizes);
    fputs("  </DiskSection>\n", f);
    put_system(f, name, o, (unsigned)n);
    fputs("</Envelope>\n", f);
    for (long at = ftell(f); at >= 0 && (size_t)at < room; at++)
        fputc('\n', f);
    if (fclose(f) == 0)
        return text;
    free(text);
    return NULL;
}

/* ------------------------------------------------------------------ headers of the tar */

struct catch
{
    uint8_t *block;
    size_t got;
};

static la_ssize_t catch_write(struct archive *a, void *user, const void *buf, size_t len)
{
    struct catch *c = user;
    size_t n = dr_min(len, OVA_BLOCK - c->got);
    (void)a;
    if (n == 0) /* the end of the file, which is written elsewhere */
        return -1;
    memcpy(c->block + c->got, buf, n);
    c->got += n;
    return (la_ssize_t)len;
}

int ova_tar_header(const char *name, uint64_t size, int64_t mtime, uint8_t block[OVA_BLOCK],
                   struct dr_error *err)
{
    int loaded = dr_load_archive(err);
    if (loaded < 0)
        return dr_prefix(err, loaded, "%s", name);
    struct catch c = {.block = block};
    struct archive *a = archive_write_new();
    struct archive_entry *e = archive_entry_new();
    int r = a && e ? 0 : dr_fail(err, ENOMEM, "%s: out of memory", name);
    if (r == 0) {
        if (size >> 33) /* more than eleven octal digits */
            archive_write_set_format_gnutar(a);
        else
            archive_write_set_format_ustar(a);
        archive_write_set_bytes_per_block(a, 0);
        archive_entry_set_pathname(e, name);
        archive_entry_set_filetype(e, AE_IFREG);
        archive_entry_set_perm(e, 0644);
        archive_entry_set_size(e, (int64_t)size);
        archive_entry_set_mtime(e, mtime, 0);
        if (archive_write_open(a, &c, NULL, catch_write, NULL) != ARCHIVE_OK ||
            archive_write_header(a, e) != ARCHIVE_OK || c.got != OVA_BLOCK)
            r = dr_fail(err, EINVAL, "%s: cannot make its header of a tar: %s", name,
                        archive_error_string(a) ? archive_error_string(a) : "too long");
    }
    archive_entry_free(e);
    archive_write_free(a);
    return r;
}

/* ------------------------------------------------------------------ a file that sums up */

struct tap {
    struct dr_file base;
    struct dr_file *out; /* or NULL */
    struct ova_summing *sum;
    uint64_t at; /* where the next write begins */
};

static void tap_close(struct dr_file *f)
{
    free(f->path);
    free(f);
}

static ssize_t tap_pread(struct dr_file *f, void *buf, uint64_t off, size_t len)
{
    (void)f;
    (void)buf;
    (void)off;
    (void)len;
    return -ESPIPE;
}

static int tap_pwritev(struct dr_file *f, struct iovec *iov, int n, uint64_t off)
{
    struct tap *t = (struct tap *)f;
    struct dr_error err = DR_ERROR_INIT;
    if (off != t->at)
        return -ESPIPE;
    for (int i = 0; i < n; i++) {
        if (t->sum)
            ova_summing_add(t->sum, iov[i].iov_base, iov[i].iov_len);
        t->at += iov[i].iov_len;
    }
    return t->out ? dr_file_pwritev(t->out, iov, n, off, &err) : 0;
}

static int tap_flush(struct dr_file *f)
{
    (void)f;
    return 0;
}

static const struct dr_file_ops tap_ops = {
    .name = "tap",
    .close = tap_close,
    .pread = tap_pread,
    .pwritev = tap_pwritev,
    .zero = NULL,
    .flush = tap_flush,
};

int ova_tap(struct dr_file *out, const char *name, struct ova_summing *sum, struct dr_file **tap,
            struct dr_error *err)
{
    struct tap *t = calloc(1, sizeof(*t));
    char *path = strdup(name);
    *tap = NULL;
    if (!t || !path) {
        free(t);
        free(path);
        return dr_fail(err, ENOMEM, "%s: out of memory", name);
    }
    t->base = (struct dr_file){
        .ops = &tap_ops,
        .id = {.owner = t, .ino = (uintptr_t)t},
        .path = path,
        .atomic_size = 512,
    };
    t->out = out;
    t->sum = sum;
    t->at = out ? dr_file_size(out) : 0;
    t->base.size = t->at;
    return dr_file_adopt(&t->base, DR_FILE_RDWR, tap, err);
}
