// A team of threads that walks through a list of operations together. The units of an operation are handed out one by
// one; the next operation begins when all of them are done. A thread that the system has put aside holds up nobody,
// unless it was put aside in the midst of a unit. Which thread computes a unit changes no result.
#pragma once
#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdlib.h>

#define MAX_STAGES 4096

// The number of a run, and of units not handed out or not done. A late thread sees that its run is over.
typedef _Atomic uint64_t count;

struct stage {
    _Alignas(64) count left;  // to hand out
    count undone;
    int units;
};

struct team {
    int threads;
    atomic_int stages;
    struct stage *stage;
    pthread_t *handles;
    pthread_mutex_t mutex;
    pthread_cond_t started;
    _Atomic uint32_t run;
    atomic_int sleeping, stopping;
    void (*unit)(void *, int, int);
    void *argument;
};

// Other processes want the cores too: spin for some microseconds, then give the core away between looks.
#define SPINS 2000

INLINE int claim(struct stage *stage, uint32_t run) {
    uint64_t seen = atomic_load_explicit(&stage->left, memory_order_acquire);
    while (seen >> 32 == run && (uint32_t)seen)
        if (atomic_compare_exchange_weak_explicit(&stage->left, &seen, seen - 1, memory_order_acq_rel, memory_order_acquire))
            return stage->units - (int)(uint32_t)seen;
    return -1;
}

// Whether the run goes on beyond this stage.
INLINE int wait_for(struct stage *stage, uint32_t run) {
    for (int spins = 0;; spins++) {
        const uint64_t seen = atomic_load_explicit(&stage->undone, memory_order_acquire);
        if (seen >> 32 != run) return 0;
        if (!(uint32_t)seen) return 1;
        if (spins < SPINS) _mm_pause();
        else sched_yield();
    }
}

static void walk(struct team *team, uint32_t run, int stages) {
    for (int i = 0; i < stages; i++) {
        struct stage *stage = &team->stage[i];
        for (int unit; (unit = claim(stage, run)) >= 0;) {
            team->unit(team->argument, i, unit);
            atomic_fetch_sub_explicit(&stage->undone, 1, memory_order_acq_rel);
        }
        if (!wait_for(stage, run)) return;
    }
}

static void *team_member(void *argument) {
    struct team *team = argument;
    uint32_t seen = 0;
    for (;;) {
        int spins = 0;
        while (atomic_load_explicit(&team->run, memory_order_acquire) == seen && ++spins < SPINS) _mm_pause();
        if (spins >= SPINS) {
            pthread_mutex_lock(&team->mutex);
            atomic_fetch_add(&team->sleeping, 1);
            while (atomic_load(&team->run) == seen) pthread_cond_wait(&team->started, &team->mutex);
            atomic_fetch_sub(&team->sleeping, 1);
            pthread_mutex_unlock(&team->mutex);
        }
        seen = atomic_load_explicit(&team->run, memory_order_acquire);
        if (atomic_load(&team->stopping)) return NULL;
        walk(team, seen, team->stages);
    }
}

// Computes unit(argument, stage, 0 ... units(stage) - 1) for each stage, one stage after another.
static int team_run(struct team *team, int stages, const int *units, void (*unit)(void *, int, int), void *argument) {
    if (team->threads == 1) {
        for (int i = 0; i < stages; i++)
            for (int u = 0; u < units[i]; u++) unit(argument, i, u);
        return 0;
    }
    const uint32_t run = atomic_load(&team->run) + 1;
    if (stages > MAX_STAGES) return -1;
    team->unit = unit, team->argument = argument, team->stages = stages;
    for (int i = 0; i < stages; i++) {
        struct stage *stage = &team->stage[i];
        stage->units = units[i];
        atomic_store_explicit(&stage->undone, (uint64_t)run << 32 | (uint32_t)units[i], memory_order_release);
        atomic_store_explicit(&stage->left, (uint64_t)run << 32 | (uint32_t)units[i], memory_order_release);
    }
    atomic_store(&team->run, run);
    if (atomic_load(&team->sleeping)) {
        pthread_mutex_lock(&team->mutex);
        pthread_cond_broadcast(&team->started);
        pthread_mutex_unlock(&team->mutex);
    }
    walk(team, run, stages);
    return 0;
}

struct team *team_new(int threads) {
    struct team *team = calloc(1, sizeof *team);
    if (!team) return NULL;
    team->handles = calloc(threads, sizeof *team->handles);
    team->stage = aligned_alloc(64, MAX_STAGES * sizeof *team->stage);
    if (!team->handles || !team->stage) {
        free(team->handles), free(team->stage), free(team);
        return NULL;
    }
    memset(team->stage, 0, MAX_STAGES * sizeof *team->stage);
    pthread_mutex_init(&team->mutex, NULL);
    pthread_cond_init(&team->started, NULL);
    int made = 1;
    while (made < threads && !pthread_create(&team->handles[made], NULL, team_member, team)) made++;
    team->threads = made;  // as many as the system gives
    return team;
}

void team_free(struct team *team) {
    atomic_store(&team->stopping, 1);
    pthread_mutex_lock(&team->mutex);
    atomic_fetch_add(&team->run, 1);
    pthread_cond_broadcast(&team->started);
    pthread_mutex_unlock(&team->mutex);
    for (int i = 1; i < team->threads; i++) pthread_join(team->handles[i], NULL);
    pthread_mutex_destroy(&team->mutex);
    pthread_cond_destroy(&team->started);
    free(team->handles), free(team->stage), free(team);
}
