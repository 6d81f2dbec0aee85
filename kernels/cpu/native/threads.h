// The threads of this process that compute: one pool, whose members wait for work in short spins, then asleep.
#pragma once
#include <immintrin.h>
#include <pthread.h>

#include <algorithm>
#include <atomic>
#include <functional>
#include <mutex>
#include <thread>
#include <vector>

class Threads {
public:
    // Never joined: it ends with its process.
    static Threads& here() {
        static Threads* threads = new Threads;
        return *threads;
    }

    // So many, the caller's included.
    void resize(int count) {
        count = std::min(count, (int)MOST - 1);
        std::lock_guard<std::mutex> guard(busy_);
        unsigned past = round_.load();
        for (int have = size_; have < count; ++have) {
            std::thread added([=, this] { serve(have, past); });
            others_.push_back(added.native_handle());
            added.detach();
        }
        if (count > size_) size_ = count;
        active_ = count;
    }

    // The caller's thread on the first of these cores from now on, each other one on the next.
    void pin(const int* cores, int count) {
        std::lock_guard<std::mutex> guard(busy_);
        for (int index = 0; index < std::min(count, size_); ++index) {
            cpu_set_t own;
            CPU_ZERO(&own);
            CPU_SET(cores[index], &own);
            pthread_setaffinity_np(index ? others_[index - 1] : pthread_self(), sizeof(own), &own);
        }
    }

    // work(0) to work(count - 1), in any order on any of the threads. Alone where another caller has them.
    template <class Work> void run(long count, const Work& work) {
        std::unique_lock<std::mutex> guard(busy_, std::try_to_lock);
        if (count <= 1 || active_ <= 1 || !guard.owns_lock()) {
            for (long index = 0; index < count; ++index) work(index);
            return;
        }
        std::function<void(long)> call = std::cref(work);
        call_ = &call;
        count_ = count;
        next_.store(0, std::memory_order_relaxed);
        running_.store(active_ - 1, std::memory_order_relaxed);
        // one word tells that there is a round and who takes part: a thread that slept through a change of their number
        // must not mistake one round for another
        unsigned number = round_.load(std::memory_order_relaxed) / MOST + 1;
        round_.store(number * MOST + active_, std::memory_order_release);
        round_.notify_all();
        take();
        for (int spins = 0; running_.load(std::memory_order_acquire);)
            if (++spins < SPINS) _mm_pause();
            else std::this_thread::yield();  // whom we wait for may have to share our core
    }

    int size() const { return active_; }

private:
    static constexpr unsigned MOST = 1024;  // threads
    static constexpr int SPINS = 4000;  // some 50 us: as long as a step's Python takes between two calls

    // A fork has the caller's thread only.
    Threads() {
        pthread_atfork(nullptr, nullptr, [] { here().size_ = here().active_ = 1, here().others_.clear(); });
    }

    void serve(int number, unsigned seen) {
        for (;;) {
            unsigned now;
            int spins = 0;
            while ((now = round_.load(std::memory_order_acquire)) == seen) {
                if (++spins < SPINS) _mm_pause();
                else round_.wait(seen, std::memory_order_acquire);
            }
            seen = now;
            if (number >= (int)(now % MOST)) continue;
            take();
            running_.fetch_sub(1, std::memory_order_release);
        }
    }

    void take() {
        for (long index; (index = next_.fetch_add(1, std::memory_order_relaxed)) < count_;) (*call_)(index);
    }

    std::mutex busy_;
    std::atomic<unsigned> round_{0};
    std::atomic<int> running_{0};
    std::atomic<long> next_{0};
    const std::function<void(long)>* call_ = nullptr;
    long count_ = 0;
    std::vector<pthread_t> others_;
    int size_ = 1, active_ = 1;
};
