//! Connections: how many, how slow they may be, and the end that waits for what runs.

use std::io;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use hyper::body::Incoming;
use hyper::service::{Service, service_fn};
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::server::graceful::GracefulShutdown;
use hyper_util::service::TowerToHyperService;
use tokio::net::TcpListener;
use tokio::sync::Semaphore;
use tokio_io_timeout::TimeoutStream;

use crate::layers::Peer;
use crate::{App, api};

/// Bytes of a request's line and headers from which on no more is read.
const MAX_HEAD: usize = 64 << 10;

/// Serves until `shutdown` is there; then takes no more, waits for what runs, but not longer than
/// configured, and ends what is left.
///
/// # Errors
/// The listener fails for good.
pub async fn serve(
    listener: TcpListener,
    app: Arc<App>,
    shutdown: impl Future<Output = ()>,
) -> io::Result<()> {
    let router = api::router(app.clone());
    let connections = GracefulShutdown::new();
    let places = Arc::new(Semaphore::new(app.config.max_connections));
    let mut shutdown = std::pin::pin!(shutdown);
    loop {
        let accepted = async {
            let place = places.clone().acquire_owned().await;
            (place, listener.accept().await)
        };
        let (place, accepted) = tokio::select! {
            accepted = accepted => accepted,
            () = &mut shutdown => break,
        };
        let (stream, peer) = match accepted {
            Ok((stream, address)) => (stream, Peer(address.ip())),
            Err(error) => {
                // Out of file descriptors, or the client is gone already: others will come.
                tracing::warn!(%error, "a connection could not be accepted");
                tokio::time::sleep(Duration::from_millis(50)).await;
                continue;
            }
        };
        // Tokens are sent as they come. Where that cannot be set, they are merely later.
        let _later = stream.set_nodelay(true);
        let mut stream = TimeoutStream::new(stream);
        stream.set_write_timeout(Some(app.config.write_timeout));
        let router = router.clone();
        let service = service_fn(move |mut request: hyper::Request<Incoming>| {
            request.extensions_mut().insert(peer);
            TowerToHyperService::new(router.clone()).call(request)
        });
        let connection = hyper::server::conn::http1::Builder::new()
            .timer(TokioTimer::new())
            .header_read_timeout(app.config.read_timeout)
            .max_buf_size(MAX_HEAD)
            .serve_connection(TokioIo::new(Box::pin(stream)), service);
        let connection = connections.watch(connection);
        let app = app.clone();
        tokio::spawn(async move {
            app.metrics.connection(1);
            if let Err(error) = connection.await {
                tracing::debug!(%error, "a connection ended early");
            }
            app.metrics.connection(-1);
            drop(place);
        });
    }
    drop(listener);
    app.draining.store(true, Ordering::Relaxed);
    app.engine.close();
    tracing::info!("ending: waiting for what runs");
    let drained = connections.shutdown();
    let mut drained = std::pin::pin!(drained);
    if tokio::time::timeout(app.config.drain_timeout, &mut drained).await.is_err() {
        tracing::warn!("requests still run: they are ended");
        app.engine.abort();
        // They still get to know.
        let _stuck = tokio::time::timeout(Duration::from_secs(2), &mut drained).await;
    }
    Ok(())
}
