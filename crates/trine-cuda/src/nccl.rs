//! The processes whose cards add up numbers among themselves, by NCCL.
//!
//! Sums have a stream of their own, of the highest priority: what is computed beside them leaves no
//! multiprocessor free for long. A sum waits for an event that is recorded in the stream of the computations
//! when it is asked for. Whoever needs the sums waits on the host for an event after the last one, and asks
//! NCCL in the meantime whether a process is gone: on the card a sum would wait for it for ever.

use std::ffi::{CStr, c_char, c_void};
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use cudarc::driver::{result as cu, sys as cu_sys};
use cudarc::nccl::{result as nccl, sys};

use crate::backend::{Address, Meeting};
use crate::driver::call;
use crate::error::{CudaError, Result};

/// How long sums are left alone between two questions.
const PAUSE: Duration = Duration::from_micros(50);

/// How long the others of this machine are waited for in the end.
const PATIENCE: Duration = Duration::from_secs(5);

/// What the processes that meet tell each other, if NCCL is found.
///
/// # Errors
/// When NCCL fails.
pub(crate) fn meeting() -> Result<Option<Meeting>> {
    // SAFETY: the library may be loaded at any time.
    if !unsafe { sys::is_culib_present() } {
        return Ok(None);
    }
    let id = nccl::get_uniqueid().map_err(failed("NCCL's unique id"))?;
    Ok(Some(id.internal.map(|byte| byte as u8)))
}

/// The other processes. When this is dropped, sums that are on their way are given up.
pub(crate) struct Others {
    communicator: sys::ncclComm_t,
    stream: cu_sys::CUstream,
    /// Recorded where a sum may begin.
    ready: cu_sys::CUevent,
    /// Recorded after the last sum.
    summed: cu_sys::CUevent,
    /// Whether there are sums that have not been waited for.
    on_their_way: bool,
}

// SAFETY: handles of CUDA and NCCL may be used by any thread, one at a time, as `&mut self` makes sure.
unsafe impl Send for Others {}

impl Others {
    /// Meets them, with the card's context current: this is process `rank` of `size`.
    ///
    /// # Errors
    /// A card that two processes have, or a process that does not come.
    pub(crate) fn meet(meeting: &Meeting, rank: usize, size: usize) -> Result<Self> {
        let mut others = Self {
            communicator: std::ptr::null_mut(),
            stream: std::ptr::null_mut(),
            ready: std::ptr::null_mut(),
            summed: std::ptr::null_mut(),
            on_their_way: false,
        };
        let (_, highest) = cu::stream::get_priority_range().map_err(call("priorities"))?;
        // It must not wait for the stream of the computations, which is the context's own.
        let kind = cu::stream::StreamKind::NonBlocking;
        others.stream =
            cu::stream::create_with_priority(kind, highest).map_err(call("a stream"))?;
        for event in [&mut others.ready, &mut others.summed] {
            let flags = cu_sys::CUevent_flags::CU_EVENT_DISABLE_TIMING;
            *event = cu::event::create(flags).map_err(call("an event"))?;
        }
        let id = sys::ncclUniqueId { internal: meeting.map(|byte| byte as c_char) };
        let at = &raw mut others.communicator;
        // SAFETY: the handle is written where it is, and destroyed when this is dropped.
        unsafe { nccl::comm_init_rank(at, size as i32, id, rank as i32) }
            .map_err(failed("meeting the other processes"))?;
        Ok(others)
    }

    /// Begins to add up numbers over all processes, in place, after what the card has been asked for.
    ///
    /// # Errors
    /// When the card has failed, or another process, as far as NCCL has noticed.
    pub(crate) fn sum(&mut self, at: Address, count: usize) -> Result<()> {
        self.on_their_way = true;
        let wait = cu_sys::CUevent_wait_flags::CU_EVENT_WAIT_DEFAULT;
        // SAFETY: stream and events live as long as this; the numbers are memory of the device, which is
        // read and written in the stream's order.
        unsafe {
            cu::event::record(self.ready, std::ptr::null_mut())
                .and_then(|()| cu::stream::wait_event(self.stream, self.ready, wait))
                .map_err(call("a sum over processes"))?;
            nccl::all_reduce(
                at as *const c_void,
                at as *mut c_void,
                count,
                sys::ncclDataType_t::ncclFloat32,
                sys::ncclRedOp_t::ncclSum,
                self.communicator,
                self.stream.cast(),
            )
        }
        .map_err(failed("a sum over processes"))?;
        Ok(())
    }

    /// Waits for the sums.
    ///
    /// # Errors
    /// As of [`sum`](Self::sum).
    pub(crate) fn join(&mut self) -> Result<()> {
        if !self.on_their_way {
            return Ok(());
        }
        let what = "the sums over processes";
        // SAFETY: stream and events live as long as this.
        unsafe { cu::event::record(self.summed, self.stream) }.map_err(call(what))?;
        loop {
            // SAFETY: as above.
            match unsafe { cu::event::query(self.summed) } {
                Ok(()) => break,
                Err(e) if e.0 == cu_sys::CUresult::CUDA_ERROR_NOT_READY => self.ask()?,
                Err(e) => return Err(call(what)(e)),
            }
            thread::sleep(PAUSE);
        }
        self.on_their_way = false;
        Ok(())
    }

    /// Asks NCCL whether something is wrong.
    fn ask(&self) -> Result<()> {
        let mut found = sys::ncclResult_t::ncclSuccess;
        // SAFETY: the communicator lives as long as this.
        let asked = unsafe { sys::ncclCommGetAsyncError(self.communicator, &raw mut found) };
        let answers = asked.result().and_then(|_| found.result());
        answers.map_err(failed("the sums over processes")).map(|_| ())
    }
}

impl Drop for Others {
    fn drop(&mut self) {
        /// Ends in a thread of its own.
        struct Communicator(sys::ncclComm_t);
        // SAFETY: nobody else uses it any more.
        unsafe impl Send for Communicator {}
        impl Communicator {
            fn end(self, gives_up: bool) {
                // SAFETY: it was made by `meet`. What fails here has failed before.
                let _ = unsafe {
                    match gives_up {
                        true => nccl::comm_abort(self.0),
                        false => nccl::comm_destroy(self.0),
                    }
                };
            }
        }
        if !self.communicator.is_null() {
            // NCCL waits for the other processes of this machine, who may be gone, or in no hurry. It tells
            // the card to give up before that.
            let (communicator, gives_up) = (Communicator(self.communicator), self.on_their_way);
            let (over, wait) = mpsc::channel();
            let end = move || {
                communicator.end(gives_up);
                let _ = over.send(());
            };
            let began = thread::Builder::new().spawn(end);
            if began.is_err() || wait.recv_timeout(PATIENCE).is_err() {
                // It may still use the stream.
                return;
            }
        }
        // SAFETY: these were made by `meet`, and nothing uses them after this.
        unsafe {
            for event in [self.ready, self.summed].into_iter().filter(|event| !event.is_null()) {
                let _ = cu::event::destroy(event);
            }
            if !self.stream.is_null() {
                let _ = cu::stream::destroy(self.stream);
            }
        }
    }
}

/// As [`call`], of NCCL, whose errors have their text elsewhere.
fn failed(what: &str) -> impl Fn(nccl::NcclError) -> CudaError + use<'_> {
    move |e| {
        // SAFETY: both return texts that stay, or null; a communicator is not needed for the second.
        let texts = unsafe {
            [sys::ncclGetErrorString(e.0), sys::ncclGetLastError(std::ptr::null_mut())]
                .map(|text| if text.is_null() { None } else { Some(CStr::from_ptr(text)) })
        };
        let texts = texts.into_iter().flatten().map(|text| text.to_string_lossy());
        let texts: Vec<String> = texts.map(|text| text.trim().to_owned()).collect();
        let told: Vec<&str> = texts.iter().map(String::as_str).filter(|t| !t.is_empty()).collect();
        CudaError::Call { what: what.to_owned(), message: format!("NCCL: {}", told.join(": ")) }
    }
}
