/* A wall clock that a test can set: preloaded into the processes of a server (wall_clock.py), it moves what they read of it.
 *
 * WALL_CLOCK_FILE names a file of eight bytes, the offset in nanoseconds; it may change at any time. Monotonic clocks stay.
 * The kernel knows nothing of the offset, so waits until a point of the wall clock are cut into slices, before each of which
 * the offset is read again: a jump makes such a wait end early or late, as on a machine whose clock is set. Not cut are
 * clock_nanosleep until a point, sem_clockwait, pthread_mutex_clocklock, timed read-write locks, message queues and timerfd.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/futex.h>
#include <pthread.h>
#include <semaphore.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>

#define SECOND INT64_C(1000000000)
#define SLICE (SECOND / 10)

/* The definition that this library hides. */
#define HIDDEN(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))

static const volatile int64_t* offset_in_file;

__attribute__((constructor)) static void map_offset(void)
{
    const char* path = getenv("WALL_CLOCK_FILE");
    int file = path == NULL ? -1 : open(path, O_RDONLY | O_CLOEXEC);
    if (file < 0)
        return;
    void* memory = mmap(NULL, sizeof(int64_t), PROT_READ, MAP_SHARED, file, 0);
    close(file);
    if (memory != MAP_FAILED)
        offset_in_file = memory;
}

static int64_t offset(void) { return offset_in_file == NULL ? 0 : *offset_in_file; }

static int64_t nanoseconds(const struct timespec* time) { return time->tv_sec * SECOND + time->tv_nsec; }

static struct timespec timespec_of(int64_t nanoseconds)
{
    return (struct timespec){.tv_sec = nanoseconds / SECOND, .tv_nsec = nanoseconds % SECOND};
}

static int is_wall(clockid_t clock) { return clock == CLOCK_REALTIME || clock == CLOCK_REALTIME_COARSE; }

static int64_t kernel_now(clockid_t clock)
{
    static __typeof__(&clock_gettime) hidden;
    struct timespec time;
    if (hidden == NULL)
        hidden = HIDDEN(clock_gettime);
    hidden(clock, &time);
    return nanoseconds(&time);
}

/* --- what is read ------------------------------------------------------------------------------------------------- */

int clock_gettime(clockid_t clock, struct timespec* time)
{
    static __typeof__(&clock_gettime) hidden;
    if (hidden == NULL)
        hidden = HIDDEN(clock_gettime);
    int status = hidden(clock, time);
    if (status == 0 && is_wall(clock))
        *time = timespec_of(nanoseconds(time) + offset());
    return status;
}

int gettimeofday(struct timeval* restrict time, void* restrict zone)
{
    (void)zone;
    int64_t now = kernel_now(CLOCK_REALTIME) + offset();
    *time = (struct timeval){.tv_sec = now / SECOND, .tv_usec = now % SECOND / 1000};
    return 0;
}

time_t time(time_t* seconds)
{
    time_t now = (kernel_now(CLOCK_REALTIME) + offset()) / SECOND;
    if (seconds != NULL)
        *seconds = now;
    return now;
}

int timespec_get(struct timespec* time, int base)
{
    return base == TIME_UTC && clock_gettime(CLOCK_REALTIME, time) == 0 ? base : 0;
}

/* --- what waits --------------------------------------------------------------------------------------------------- */

/* The next point, by the kernel's clock, at which to look again; returns whether that is the deadline. */
static int next_slice(const struct timespec* deadline, struct timespec* end)
{
    int64_t due = nanoseconds(deadline) - offset(), slice = kernel_now(CLOCK_REALTIME) + SLICE;
    *end = timespec_of(due < slice ? (due < 0 ? 0 : due) : slice);
    return due < slice;
}

static int wait_for_condition(pthread_cond_t* condition, pthread_mutex_t* mutex, clockid_t clock, const struct timespec* deadline)
{
    static __typeof__(&pthread_cond_clockwait) hidden;
    if (hidden == NULL)
        hidden = HIDDEN(pthread_cond_clockwait);
    if (!is_wall(clock))
        return hidden(condition, mutex, clock, deadline);
    struct timespec end;
    int is_last = next_slice(deadline, &end), status = hidden(condition, mutex, clock, &end);
    /* POSIX lets it wake for nothing. To go on waiting here would miss what was signalled meanwhile. */
    return status == ETIMEDOUT && !is_last ? 0 : status;
}

int pthread_cond_clockwait(pthread_cond_t* condition, pthread_mutex_t* mutex, clockid_t clock, const struct timespec* deadline)
{
    return wait_for_condition(condition, mutex, clock, deadline);
}

/* A condition's clock cannot be asked for, but no machine has run for thirty years, and the wall clock is not set to before 2001. */
int pthread_cond_timedwait(pthread_cond_t* condition, pthread_mutex_t* mutex, const struct timespec* deadline)
{
    clockid_t clock = deadline->tv_sec > 1000000000 ? CLOCK_REALTIME : CLOCK_MONOTONIC;
    return wait_for_condition(condition, mutex, clock, deadline);
}

int pthread_mutex_timedlock(pthread_mutex_t* mutex, const struct timespec* deadline)
{
    static __typeof__(&pthread_mutex_timedlock) hidden;
    if (hidden == NULL)
        hidden = HIDDEN(pthread_mutex_timedlock);
    struct timespec end;
    int is_last, status;
    do {
        is_last = next_slice(deadline, &end);
        status = hidden(mutex, &end);
    } while (status == ETIMEDOUT && !is_last);
    return status;
}

int sem_timedwait(sem_t* semaphore, const struct timespec* deadline)
{
    static __typeof__(&sem_timedwait) hidden;
    if (hidden == NULL)
        hidden = HIDDEN(sem_timedwait);
    struct timespec end;
    int is_last, status;
    do {
        is_last = next_slice(deadline, &end);
        status = hidden(semaphore, &end);
    } while (status != 0 && errno == ETIMEDOUT && !is_last);
    return status;
}

/* std::future, abseil and Rust wait by futexes of their own. */
long syscall(long number, ...)
{
    static __typeof__(&syscall) hidden;
    if (hidden == NULL)
        hidden = HIDDEN(syscall);
    va_list list;
    va_start(list, number);
    long given[6];
    for (int i = 0; i < 6; i++)
        given[i] = va_arg(list, long);
    va_end(list);
    const struct timespec* deadline = (const struct timespec*)given[3];
    if (number != SYS_futex || !(given[1] & FUTEX_CLOCK_REALTIME) || deadline == NULL)
        return hidden(number, given[0], given[1], given[2], given[3], given[4], given[5]);
    struct timespec end;
    int is_last;
    long status;
    do {
        is_last = next_slice(deadline, &end);
        status = hidden(number, given[0], given[1], given[2], &end, given[4], given[5]);
    } while (status != 0 && errno == ETIMEDOUT && !is_last);
    return status;
}
