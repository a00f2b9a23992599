//! Connections between processes, of one machine or of several.

use std::io::{self, Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream, ToSocketAddrs};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};

/// Where a rank listens.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Address {
    /// A socket in a folder that others cannot open.
    Local(PathBuf),
    /// HOST:PORT, or an IP address with one.
    Network(String),
}

impl Address {
    pub(super) fn connect(&self) -> io::Result<Stream> {
        match self {
            Self::Local(path) => UnixStream::connect(path).map(Stream::Local),
            Self::Network(name) => {
                let mut last = io::Error::other("the name stands for no address");
                for address in name.to_socket_addrs()? {
                    match TcpStream::connect_timeout(&address, Duration::from_secs(10)) {
                        Ok(stream) => {
                            // Votes are short, and waited for.
                            stream.set_nodelay(true)?;
                            return Ok(Stream::Network(stream));
                        }
                        Err(error) => last = error,
                    }
                }
                Err(last)
            }
        }
    }

    /// Listens here; a network's port 0 stands for any. Never waits in [`Listener::accept`].
    pub(super) fn listen(&self) -> io::Result<Listener> {
        let listener = match self {
            Self::Local(path) => Listener::Local(UnixListener::bind(path)?),
            Self::Network(name) => Listener::Network(TcpListener::bind(name)?),
        };
        match &listener {
            Listener::Local(listener) => listener.set_nonblocking(true)?,
            Listener::Network(listener) => listener.set_nonblocking(true)?,
        }
        Ok(listener)
    }
}

impl std::fmt::Display for Address {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Local(path) => path.display().fmt(f),
            Self::Network(name) => f.write_str(name),
        }
    }
}

pub(super) enum Listener {
    Local(UnixListener),
    Network(TcpListener),
}

impl Listener {
    /// The next connection, or an error of the kind `WouldBlock`.
    pub(super) fn accept(&self) -> io::Result<Stream> {
        let stream = match self {
            Self::Local(listener) => Stream::Local(listener.accept()?.0),
            Self::Network(listener) => {
                let (stream, _) = listener.accept()?;
                stream.set_nodelay(true)?;
                Stream::Network(stream)
            }
        };
        stream.set_nonblocking(false)?;
        Ok(stream)
    }

    /// The port of a network's.
    pub(super) fn port(&self) -> io::Result<u16> {
        match self {
            Self::Local(_) => Ok(0),
            Self::Network(listener) => Ok(listener.local_addr()?.port()),
        }
    }
}

/// A connection to another rank.
pub(crate) enum Stream {
    Local(UnixStream),
    Network(TcpStream),
}

impl Stream {
    pub(super) fn set_nonblocking(&self, is_so: bool) -> io::Result<()> {
        match self {
            Self::Local(stream) => stream.set_nonblocking(is_so),
            Self::Network(stream) => stream.set_nonblocking(is_so),
        }
    }

    pub(super) fn set_read_timeout(&self, patience: Option<Duration>) -> io::Result<()> {
        match self {
            Self::Local(stream) => stream.set_read_timeout(patience),
            Self::Network(stream) => stream.set_read_timeout(patience),
        }
    }

    /// Whether the other side has closed it.
    pub(super) fn is_closed(&self) -> bool {
        let mut fds = [PollFd::new(self, PollFlags::RDHUP)];
        let now = Timespec { tv_sec: 0, tv_nsec: 0 };
        let ended = PollFlags::RDHUP | PollFlags::HUP | PollFlags::ERR;
        poll(&mut fds, Some(&now)).is_ok() && fds[0].revents().intersects(ended)
    }

    /// Ends it for both sides.
    pub(super) fn shut_down(&self) {
        // It may be closed already.
        let _ = match self {
            Self::Local(stream) => stream.shutdown(Shutdown::Both),
            Self::Network(stream) => stream.shutdown(Shutdown::Both),
        };
    }

    /// The IP addresses of this side and the other; none of a connection within a machine.
    pub(super) fn ends(&self) -> io::Result<Option<[std::net::IpAddr; 2]>> {
        match self {
            Self::Local(_) => Ok(None),
            Self::Network(stream) => {
                Ok(Some([stream.local_addr()?.ip(), stream.peer_addr()?.ip()]))
            }
        }
    }
}

impl Read for &Stream {
    fn read(&mut self, to: &mut [u8]) -> io::Result<usize> {
        match self {
            Stream::Local(stream) => (&mut &*stream).read(to),
            Stream::Network(stream) => (&mut &*stream).read(to),
        }
    }
}

impl Write for &Stream {
    fn write(&mut self, from: &[u8]) -> io::Result<usize> {
        match self {
            Stream::Local(stream) => (&mut &*stream).write(from),
            Stream::Network(stream) => (&mut &*stream).write(from),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl AsFd for Stream {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match self {
            Self::Local(stream) => stream.as_fd(),
            Self::Network(stream) => stream.as_fd(),
        }
    }
}

/// The socket of a rank in a folder.
pub(super) fn local(folder: &Path, rank: usize) -> Address {
    Address::Local(folder.join(rank.to_string()))
}
