// Work that threads share out: each goes through a stretch of its own, in order, and then helps with the others'. What
// lies behind an item in memory is mostly what its thread reads next, and a thread that is held up holds up nobody.
#pragma once
#include <algorithm>
#include <atomic>
#include <cstdint>

namespace quire {

class Shares {
    static constexpr int MOST = 64;
    struct alignas(64) Share {
        std::atomic<int> next;
        int end;
    };
    Share share[MOST];
    const int n;
    std::atomic<int> arrived{0};

public:
    Shares(int items, int threads) : n(std::clamp(threads, 1, MOST)) {
        for (int i = 0; i < n; i++) {
            share[i].next.store((int)((int64_t)items * i / n), std::memory_order_relaxed);
            share[i].end = (int)((int64_t)items * (i + 1) / n);
        }
    }

    // Calls each(item) until none is left. Every thread calls this once.
    template <class F>
    void run(const F& each) {
        const int mine = arrived.fetch_add(1, std::memory_order_relaxed);
        for (int i = 0; i < n; i++) {
            Share& of = share[(mine + i) % n];
            for (int item; (item = of.next.fetch_add(1, std::memory_order_relaxed)) < of.end;) each(item);
        }
    }
};

}  // namespace quire
