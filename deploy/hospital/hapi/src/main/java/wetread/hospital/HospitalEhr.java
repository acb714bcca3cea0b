package wetread.hospital;

import ca.uhn.fhir.context.support.IValidationSupport;
import ca.uhn.fhir.jpa.api.config.JpaStorageSettings;
import ca.uhn.fhir.jpa.api.dao.IFhirSystemDao;
import ca.uhn.fhir.jpa.provider.JpaCapabilityStatementProvider;
import ca.uhn.fhir.jpa.provider.JpaSystemProvider;
import ca.uhn.fhir.jpa.search.DatabaseBackedPagingProvider;
import ca.uhn.fhir.rest.api.EncodingEnum;
import ca.uhn.fhir.rest.server.RestfulServer;
import ca.uhn.fhir.rest.server.provider.ResourceProviderFactory;
import ca.uhn.fhir.rest.server.util.ISearchParamRegistry;
import ca.uhn.fhir.interceptor.api.IInterceptorService;
import java.net.InetSocketAddress;
import org.eclipse.jetty.ee10.servlet.ServletContextHandler;
import org.eclipse.jetty.ee10.servlet.ServletHolder;
import org.eclipse.jetty.server.Server;
import org.slf4j.Logger;
import org.slf4j.LoggerFactory;
import org.springframework.context.annotation.AnnotationConfigApplicationContext;

/** Serves FHIR R4 at http://127.0.0.1:PORT/fhir until it is terminated. The port is the only argument. */
public final class HospitalEhr {
    private static final Logger LOG = LoggerFactory.getLogger(HospitalEhr.class);

    private HospitalEhr() {}

    public static void main(String[] arguments) throws Exception {
        int port = Integer.parseInt(arguments[0]);
        AnnotationConfigApplicationContext spring = new AnnotationConfigApplicationContext(EhrConfig.class);
        LOG.info("storage is up");
        Server jetty = new Server(new InetSocketAddress("127.0.0.1", port));
        ServletContextHandler root = new ServletContextHandler("/");
        ServletHolder holder = new ServletHolder(fhirServer(spring));
        holder.setInitOrder(1);
        root.addServlet(holder, "/fhir/*");
        jetty.setHandler(root);
        jetty.start();
        LOG.info("serving FHIR R4 on port {}", port);
        jetty.join();
    }

    private static RestfulServer fhirServer(AnnotationConfigApplicationContext spring) {
        IFhirSystemDao<?, ?> system = spring.getBean(IFhirSystemDao.class);
        RestfulServer server = new RestfulServer(system.getContext());
        server.setInterceptorService(spring.getBean(IInterceptorService.class));
        server.registerProviders(spring.getBean(ResourceProviderFactory.class).createProviders());
        server.registerProvider(spring.getBean(JpaSystemProvider.class));
        server.setServerConformanceProvider(new JpaCapabilityStatementProvider(
                server,
                system,
                spring.getBean(JpaStorageSettings.class),
                spring.getBean(ISearchParamRegistry.class),
                spring.getBean(IValidationSupport.class)));
        server.setPagingProvider(spring.getBean(DatabaseBackedPagingProvider.class));
        server.setDefaultResponseEncoding(EncodingEnum.JSON);
        return server;
    }
}
