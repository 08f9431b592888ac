//! jemalloc, set so that memory of closed connections goes back to the system.

use tikv_jemallocator::Jemalloc;

#[global_allocator]
static GLOBAL: Jemalloc = Jemalloc;

/// Read by jemalloc before `main`: two arenas, because a few shards allocate and each arena keeps free pages of
/// its own; unused pages are returned within a second, as a server that lost its clients should shrink.
// SAFETY: jemalloc looks for a `const char *` of this name that points to a terminated string and only reads it.
// A reference to an array is such a pointer, the string ends with a zero byte, and nothing else has the name.
#[expect(unsafe_code, reason = "a symbol under a fixed name is how jemalloc is configured at link time")]
#[unsafe(export_name = "_rjem_malloc_conf")]
#[used]
static CONFIGURATION: &[u8; 47] = b"narenas:2,dirty_decay_ms:1000,muzzy_decay_ms:0\0";
