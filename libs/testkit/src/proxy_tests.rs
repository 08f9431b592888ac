//! The proxy between a client and a server that sends everything back.

use std::io::ErrorKind;

use tokio::time::timeout;

use super::*;
use crate::wait::eventually;

/// Longer than anything here takes.
const PATIENCE: Duration = Duration::from_secs(10);

/// Long enough to be sure that nothing comes.
const SILENCE: Duration = Duration::from_millis(150);

/// A server that sends everything back, and says when it has done so to whom it has.
async fn echo() -> (SocketAddr, mpsc::UnboundedReceiver<Vec<u8>>) {
    let listener = TcpListener::bind(("127.0.0.1", 0)).await.unwrap();
    let address = listener.local_addr().unwrap();
    let (seen, sees) = mpsc::unbounded_channel();
    tokio::spawn(async move {
        while let Ok((mut socket, _)) = listener.accept().await {
            let seen = seen.clone();
            tokio::spawn(async move {
                let mut buffer = vec![0; PART];
                while let Ok(count @ 1..) = socket.read(&mut buffer).await {
                    let _ = seen.send(buffer[..count].to_owned());
                    if socket.write_all(&buffer[..count]).await.is_err() {
                        return;
                    }
                }
                let _ = seen.send(b"(end)".to_vec());
            });
        }
    });
    (address, sees)
}

async fn client(proxy: &Proxy) -> TcpStream {
    TcpStream::connect(proxy.address()).await.unwrap()
}

/// Sends, and reads as much.
async fn exchange(socket: &mut TcpStream, text: &[u8]) -> io::Result<()> {
    socket.write_all(text).await?;
    let mut answer = vec![0; text.len()];
    timeout(PATIENCE, socket.read_exact(&mut answer)).await.expect("an answer or an end")?;
    assert_eq!(answer, text);
    Ok(())
}

/// Whether nothing comes for a while.
async fn is_silent(socket: &mut TcpStream) -> bool {
    timeout(SILENCE, socket.read_u8()).await.is_err()
}

#[tokio::test]
async fn bytes_pass_until_a_cut_resets_them() {
    let (address, _sees) = echo().await;
    let proxy = Proxy::to(address).await;
    let mut socket = client(&proxy).await;
    exchange(&mut socket, &[7; 200_000]).await.unwrap();
    assert_eq!((proxy.connections(), proxy.accepted()), (1, 1));
    proxy.cut();
    assert_eq!(socket.read_u8().await.unwrap_err().kind(), ErrorKind::ConnectionReset);
    let refused = async { exchange(&mut TcpStream::connect(proxy.address()).await?, b"x").await };
    assert!(refused.await.is_err());
    eventually("nothing is open", PATIENCE, async || (proxy.connections() == 0).then_some(())).await;
    proxy.pass();
    exchange(&mut client(&proxy).await, b"again").await.unwrap();
}

#[tokio::test]
async fn an_end_is_passed_on_after_the_last_byte() {
    let (address, _sees) = echo().await;
    let proxy = Proxy::to(address).await;
    proxy.delay(Duration::from_millis(20));
    let mut socket = client(&proxy).await;
    socket.write_all(b"last words").await.unwrap();
    socket.shutdown().await.unwrap();
    let mut all = Vec::new();
    timeout(PATIENCE, socket.read_to_end(&mut all)).await.unwrap().unwrap();
    assert_eq!(all, b"last words");
    eventually("it is closed", PATIENCE, async || (proxy.connections() == 0).then_some(())).await;
}

#[tokio::test]
async fn each_direction_has_a_black_hole_of_its_own() {
    let (address, mut sees) = echo().await;
    let proxy = Proxy::to(address).await;
    let mut socket = client(&proxy).await;
    exchange(&mut socket, b"before").await.unwrap();
    assert_eq!(sees.recv().await.unwrap(), b"before");

    proxy.set(Direction::Reply, Mode::Swallow);
    socket.write_all(b"heard").await.unwrap();
    assert_eq!(timeout(PATIENCE, sees.recv()).await.unwrap().unwrap(), b"heard");
    assert!(is_silent(&mut socket).await);

    proxy.pass();
    proxy.set(Direction::Request, Mode::Swallow);
    socket.write_all(b"unheard").await.unwrap();
    assert!(is_silent(&mut socket).await);
    assert!(sees.try_recv().is_err());

    proxy.pass();
    exchange(&mut socket, b"after").await.unwrap();
    assert_eq!(sees.recv().await.unwrap(), b"after");

    // Who vanishes there is not missed here.
    proxy.black_hole();
    drop(socket);
    assert!(timeout(SILENCE, sees.recv()).await.is_err());
    proxy.cut();
    assert!(timeout(PATIENCE, sees.recv()).await.is_ok());
}

#[tokio::test]
async fn a_delay_keeps_the_order_and_does_not_add_up() {
    let (address, _sees) = echo().await;
    let proxy = Proxy::to(address).await;
    let mut socket = client(&proxy).await;
    exchange(&mut socket, b"warm").await.unwrap();
    let delay = Duration::from_millis(100);
    proxy.delay(delay);
    let begun = Instant::now();
    let mut expected = Vec::new();
    for n in 0..20_u8 {
        expected.push(n);
        socket.write_all(&[n]).await.unwrap();
        tokio::task::yield_now().await;
    }
    let mut answer = vec![0; expected.len()];
    timeout(PATIENCE, socket.read_exact(&mut answer)).await.unwrap().unwrap();
    assert_eq!(answer, expected);
    let took = begun.elapsed();
    assert!((2 * delay..10 * delay).contains(&took), "{took:?}");
}

#[tokio::test]
async fn a_rate_lets_so_many_bytes_through_and_pass_frees_the_rest() {
    let (address, _sees) = echo().await;
    let proxy = Proxy::to(address).await;
    let mut socket = client(&proxy).await;
    proxy.set(Direction::Reply, Mode::Rate(20));
    let begun = Instant::now();
    exchange(&mut socket, b"1234567890").await.unwrap();
    assert!(begun.elapsed() >= Duration::from_millis(450), "{:?}", begun.elapsed());
    proxy.set(Direction::Reply, Mode::Rate(1));
    let mut answer = Box::pin(exchange(&mut socket, &[1; 1_000]));
    assert!(timeout(SILENCE, &mut answer).await.is_err());
    proxy.pass();
    answer.await.unwrap();
}

#[tokio::test]
async fn who_reads_slowly_makes_the_writer_wait() {
    let listener = TcpListener::bind(("127.0.0.1", 0)).await.unwrap();
    let proxy = Proxy::to(listener.local_addr().unwrap()).await;
    proxy.set(Direction::Reply, Mode::Rate(1));
    let _client = client(&proxy).await;
    let (mut server, _) = listener.accept().await.unwrap();
    let mut written = 0;
    // What the kernel and the proxy hold is bounded.
    while timeout(SILENCE, server.write_all(&[0; PART])).await.is_ok() {
        written += PART;
        assert!(written < 64 << 20, "somebody holds everything");
    }
}

#[tokio::test]
async fn a_lost_reply_belongs_to_a_request_that_was_heard() {
    let (address, mut sees) = echo().await;
    let proxy = Proxy::to(address).await;
    let (mut one, mut two) = (client(&proxy).await, client(&proxy).await);
    proxy.cut_after_request_holding(b"insert", 1);
    for text in [&b"ping"[..], b"insert 1", b"ping"] {
        exchange(&mut one, text).await.unwrap();
        assert_eq!(sees.recv().await.unwrap(), text);
    }
    assert!(exchange(&mut two, b"insert 2").await.is_err());
    assert_eq!(sees.recv().await.unwrap(), b"insert 2");
    timeout(PATIENCE, proxy.until_cut()).await.unwrap();
    assert!(exchange(&mut one, b"ping").await.is_err());
    proxy.pass();
    exchange(&mut client(&proxy).await, b"insert 3").await.unwrap();
}

#[tokio::test]
async fn nobody_behind_it_is_a_reset() {
    let gone = TcpListener::bind(("127.0.0.1", 0)).await.unwrap().local_addr().unwrap();
    let proxy = Proxy::to(gone).await;
    let mut socket = client(&proxy).await;
    assert_eq!(socket.read_u8().await.unwrap_err().kind(), ErrorKind::ConnectionReset);
    assert_eq!(proxy.accepted(), 0);
}
